"""Runs killed by SIGKILL, at random and at exact moments, and resumed: they end as the unbroken run does."""

import json
import os
import random
import shutil
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import tiny_trainer
import torch
from kill_runs import METHODS, STEPS, Run
from peft import LoraConfig, get_peft_model
from transformers import Trainer
from trl import SFTConfig

from hf_reflora import LoraSbConfig, LoraSbSFTTrainer, RefLoraSFTTrainer, RefLoraTrainer, last_checkpoint
from hf_reflora.report.card import render
from hf_reflora.report.record import RunRecord
from hf_reflora.report.snippet import read_own_tokenizer
from hf_reflora.trainers import checkpoints
from hf_reflora.trainers.checkpoints import is_complete


ROOT = Path(__file__).parents[2]
KILLED = -9
# Every file that a resumed run reads, and the record.
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
EARLY = ("run_record.json", "trainer_state.json")
MOMENTS = [*(("half", file) for file in FILES), *(("before", file) for file in EARLY)]


@pytest.mark.parametrize("save_only_model", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("method", "peft_type is LORASB there and LORA here"),
        ("r", "r is 8 there and 4 here"),
        ("layers", r"target_modules is \['q_proj'\] there and \['down_proj', 'q_proj'\] here"),
    ],
)
def test_checkpoints_of_another_adapter_are_refused(tmp_path, change, message, save_only_model):
    """torch would raise of sizes, or load what fits."""
    changes = {"save_strategy": "steps", "save_steps": 2, "save_only_model": save_only_model}
    if change == "method":
        config = LoraSbConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        tiny_trainer.build(tmp_path, LoraSbSFTTrainer, get_peft_model(tiny.llama(), config), **changes).train()
    else:
        other = {"r": 8} if change == "r" else {"target_modules": ["q_proj"]}
        tiny_trainer.build(tmp_path, RefLoraSFTTrainer, tiny.lora(tiny.llama(), **other), **changes).train()
    trainer = tiny_trainer.build(tmp_path, RefLoraSFTTrainer, max_steps=6)
    before = tiny.trainable(trainer.model)
    with pytest.raises(
        ValueError, match=rf"checkpoint-4 is of another adapter than the model's: {message}.*output_dir"
    ):
        trainer.train(resume_from_checkpoint=True)
    tiny.assert_same(tiny.trainable(trainer.model), before)


@pytest.mark.parametrize("name", ["default", "other"])
def test_checkpoints_of_the_same_adapter_are_resumed(tmp_path, name):
    """Whatever its name, and with settings that a file has as lists and a model as sets."""
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], exclude_modules=["k_proj"], rank_pattern={"q_proj": 2}
    )
    for steps in (4, 6):
        torch.manual_seed(0)
        model = get_peft_model(tiny.llama(), config, adapter_name=name)
        changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": steps}
        trainer = tiny_trainer.build(tmp_path, RefLoraSFTTrainer, model, **changes)
        trainer.train(resume_from_checkpoint=steps == 6)
    assert trainer.state.global_step == 6


def test_checkpoints_without_the_optimizer_are_refused(tmp_path):
    """transformers would go on with new moments and the first learning rate."""
    changes = {"save_strategy": "steps", "save_steps": 2}
    tiny_trainer.build(tmp_path, RefLoraSFTTrainer, save_only_model=True, **changes).train()
    trainer = tiny_trainer.build(tmp_path, RefLoraSFTTrainer, max_steps=6, **changes)
    before = tiny.trainable(trainer.model)
    for asked in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(ValueError, match=r"checkpoint-\d has .*neither the optimizer's.*save_only_model"):
            trainer.train(resume_from_checkpoint=asked)
    tiny.assert_same(tiny.trainable(trainer.model), before)


@pytest.mark.skipif(not hasattr(Trainer, "_init_training_state"), reason="transformers has no such method yet")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("step", [1, 2, 3, 5, 6])
def test_a_stream_that_is_read_several_times(tmp_path, step, accumulation):
    """It has 4 batches, and 7 steps of 1 or 2 of them end in its second or fourth pass."""
    changes = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": accumulation}
    data = tiny.token_dataset(8).to_iterable_dataset()
    unbroken = tiny_trainer.build(tmp_path, RefLoraTrainer, data=data, **changes)
    unbroken.train()
    resumed = tiny_trainer.build(tmp_path, RefLoraTrainer, data=data, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert [row.get("loss") for row in resumed.state.log_history[:-1]] == [
        row.get("loss") for row in unbroken.state.log_history[:-1]
    ]
    tiny.assert_same(tiny.trainable(resumed.model), tiny.trainable(unbroken.model))


def test_a_resumed_run_keeps_the_dtype_of_the_adapter(tmp_path):
    """PEFT loads every adapter in float32."""
    changes = {"save_strategy": "steps", "save_steps": 2}
    models = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny.llama().bfloat16(), config, autocast_adapter_dtype=False)
        tiny.fill_B(model)
        trainer = tiny_trainer.build(tmp_path, RefLoraTrainer, model, **changes)
        trainer.train(resume_from_checkpoint=resume)
        models.append(tiny.trainable(model))
    assert {value.dtype for value in models[1].values()} == {torch.bfloat16}
    tiny.assert_same(models[1], models[0])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Run and seconds of the training, by (method, processes)."""
    done = {}

    def get(method: str, processes: int = 1) -> tuple[Run, float]:
        if (method, processes) not in done:
            run = Run(tmp_path_factory.mktemp(f"{method}-{processes}"), method, processes)
            started = run.start()
            begin = time.monotonic()
            assert run.end(started) == [0] * processes, run.log()
            assert [len(values) for values in run.losses().values()] == [1] * STEPS
            done[method, processes] = run, time.monotonic() - begin
        return done[method, processes]

    return get


def assert_ends_as(run: Run, unbroken: Run, rtol: float = 0.0) -> None:
    """Losses and gradient norms of all attempts, the adapter, and the log in the record."""
    expected, found = unbroken.losses(), run.losses()
    assert sorted(found) == list(range(1, STEPS + 1))
    for step, values in found.items():
        for value in values:
            assert value == pytest.approx(expected[step][0], rel=rtol, abs=0), (step, run.out)
    tiny.assert_same(run.adapter(), unbroken.adapter(), rtol=rtol, atol=rtol)
    record = json.loads((run.out / "run_record.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in record["log"] if "loss" in entry] == list(range(1, STEPS + 1))
    starts = [(started["from_step"], started["to_step"]) for started in record["runs"]]
    assert starts[0][0] == 0
    assert starts[-1][1] == STEPS
    assert all(left[1] == right[0] for left, right in pairwise(starts)), starts


def steps(out: Path) -> dict[int, bool]:
    """The checkpoints there are, and whether they are complete."""
    return {int(folder.name.split("-")[1]): is_complete(folder) for folder in out.glob("checkpoint-*")}


def killed_at_random(run: Run, seconds: float, victims: list[slice], seed: int) -> int:
    """Starts it again and again, killing what `victims` tell, until it ends; returns how often it was killed.

    It is killed within two steps after none to three more; `seconds` are an unbroken run's.
    """
    draw, kills = random.Random(seed), 0
    for victim in victims:
        taken = run.taken() + draw.randrange(4)
        processes = run.start()
        while run.taken() < taken and all(process.is_alive() for process in processes):
            time.sleep(0.001)
        until = time.monotonic() + draw.uniform(0, 2 * seconds / STEPS)
        while time.monotonic() < until and run.taken() < taken + 2:
            time.sleep(0.001)
        for process in processes[victim]:
            process.kill()
        codes = run.end(processes)
        kills += KILLED in codes
        assert KILLED in codes or not any(codes), run.log()
        if not any(codes):
            return kills
    assert not any(run.end()), run.log()
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_random_moments(tmp_path, unbroken, method):
    """Bit for bit, in one process. KILL_SEED repeats the moments, as far as a clock can."""
    whole, seconds = unbroken(method)
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**9)))
    print(f"KILL_SEED={seed}")  # shown where the test fails
    run = Run(tmp_path, method, arguments={"save_total_limit": 2})
    assert killed_at_random(run, seconds, [slice(None)] * 4, seed) > 0
    assert_ends_as(run, whole)


@pytest.mark.slow
def test_two_processes_killed_at_random_moments(tmp_path, unbroken):
    """One of them, and both."""
    whole, seconds = unbroken("reflora", 2)
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**9)))
    print(f"KILL_SEED={seed}")
    run = Run(tmp_path, "reflora", 2)
    assert killed_at_random(run, seconds, [slice(1, 2), slice(0, 1), slice(None)], seed) > 0
    assert_ends_as(run, whole, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS, ids=" ".join)
def test_killed_in_a_save(tmp_path, unbroken, moment):
    run = Run(tmp_path, die=moment)
    assert run.end() == [KILLED], run.log()
    assert steps(tmp_path) == {2: True, 4: False}
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    again = Run(tmp_path)
    assert again.end() == [0], again.log()
    assert "Passed over, because they were not written to the end: " in again.log()
    assert_ends_as(again, unbroken("reflora")[0])


@pytest.mark.slow
def test_killed_after_the_last_step(tmp_path, unbroken):
    """In the middle of an epoch, where a stock Trainer would take one more."""
    run = Run(tmp_path, die=("before", "final/adapter_model.safetensors"))
    assert run.end() == [KILLED], run.log()
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{STEPS}")
    again = Run(tmp_path)
    assert again.end() == [0], again.log()
    assert_ends_as(again, unbroken("reflora")[0])


@pytest.mark.slow
@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json"])
def test_killed_while_an_old_checkpoint_is_overwritten(tmp_path, unbroken, file):
    """checkpoint-4 is another run's, and complete, until this run begins to write its own."""
    whole, _ = unbroken("reflora")
    for step in (2, 4):
        shutil.copytree(whole.out / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-4" / "scheduler.pt").write_bytes(b"of another run")
    run = Run(tmp_path, resume=str(tmp_path / "checkpoint-2"), die=("before", file))
    assert run.end() == [KILLED], run.log()
    assert steps(tmp_path) == {2: True, 4: False}


@pytest.mark.slow
def test_killed_while_an_old_checkpoint_is_deleted(tmp_path, unbroken):
    """The new one is complete, and what is left of the old one does not pass for it."""
    limit = {"save_total_limit": 1}
    run = Run(tmp_path, die=("delete", "optimizer.pt"), arguments=limit)
    assert run.end() == [KILLED], run.log()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert steps(tmp_path) == {2: False, 4: True}
    again = Run(tmp_path, arguments=limit)
    assert again.end() == [0], again.log()
    assert steps(tmp_path) == {STEPS: True}
    whole, _ = unbroken("reflora")
    tiny.assert_same(again.adapter(), whole.adapter())


@pytest.mark.slow
def test_killed_in_the_initialization_of_lora_sb(tmp_path, unbroken):
    """Nothing is there yet, so it starts again; after a checkpoint the initialization is skipped."""
    run = Run(tmp_path, "lora_sb", die=("collate", "5"))  # of 12 before the first step
    assert run.end() == [KILLED], run.log()
    assert steps(tmp_path) == {}
    assert not (tmp_path / "losses.jsonl").exists()
    run = Run(tmp_path, "lora_sb", die=("before", "optimizer.pt"))
    assert run.end() == [KILLED], run.log()
    assert "training starts from the beginning" in run.log()
    again = Run(tmp_path, "lora_sb")
    assert again.end() == [0], again.log()
    assert_ends_as(again, unbroken("lora_sb")[0])


@pytest.mark.slow
def test_a_checkpoint_is_complete_when_every_process_has_written(tmp_path, unbroken):
    """One of two dies before its random state; the other has written all that is its own."""
    run = Run(tmp_path, processes=2, die=("before", "rng_state_1.pth"), dies=1)
    codes = run.end()
    assert codes[1] == KILLED, run.log()
    assert codes[0] != 0
    assert (tmp_path / "checkpoint-4" / "rng_state_0.pth").exists()
    assert steps(tmp_path) == {2: True, 4: False}
    again = Run(tmp_path, processes=2)
    assert again.end() == [0, 0], again.log()
    assert_ends_as(again, unbroken("reflora", 2)[0], rtol=1e-6)


@pytest.mark.slow
def test_no_process_overwrites_a_checkpoint_that_is_complete(tmp_path, unbroken):
    """The main process dies before it removes trainer_state.json, which the other one waits for."""
    whole, _ = unbroken("reflora", 2)
    for step in (2, 4):
        shutil.copytree(whole.out / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    other = tmp_path / "checkpoint-4" / "rng_state_1.pth"
    other.write_bytes(b"of another run")
    run = Run(tmp_path, processes=2, resume=str(tmp_path / "checkpoint-2"), die=("remove", "trainer_state.json"))
    assert run.end()[0] == KILLED, run.log()
    assert steps(tmp_path) == {2: True, 4: True}
    assert other.read_bytes() == b"of another run"


@pytest.mark.slow
def test_the_recipe_killed_and_resumed(tmp_path):
    """Its record and its card are the whole run's."""
    tiny.save(tmp_path / "model", max_position_embeddings=1024)
    run = Run(tmp_path / "out", recipe=tmp_path / "model", die=("before", "optimizer.pt"))
    assert run.end() == [KILLED], run.log()
    assert steps(run.out) == {2: True, 4: False}
    path = run.out / "checkpoint-2" / "run_record.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["runs"][0]["seconds"] += 1000
    path.write_text(json.dumps(record), encoding="utf-8")
    again = replace(run, die=None)
    assert again.end() == [0], again.log()
    record = json.loads((run.out / "run_record.json").read_text(encoding="utf-8"))
    first, second = record["runs"]
    assert (first["from_step"], first["to_step"]) == (0, 2)
    assert (second["from_step"], second["to_step"]) == (2, 6)
    assert [entry["step"] for entry in record["log"] if "loss" in entry] == list(range(1, 7))
    assert record["seconds"]["total"] >= record["seconds"]["train"] >= 1000
    assert record["scores"]["rows"] == 3
    assert record["scores"]["after"]["loss"] < record["scores"]["before"]["loss"]
    assert len(record["examples"]) == 3
    assert (run.out / "README.md").read_text(encoding="utf-8") == render(
        RunRecord.from_dict(record), plot="training.png", tokenizer=read_own_tokenizer(run.out)
    )
    whole = Run(tmp_path / "whole", recipe=tmp_path / "model")
    assert whole.end() == [0], whole.log()
    unbroken = json.loads((whole.out / "run_record.json").read_text(encoding="utf-8"))
    assert record["scores"] == unbroken["scores"]
    assert record["examples"] == unbroken["examples"]
    assert record["diagnostics"] == unbroken["diagnostics"]


# What is complete


def checkpoint(folder: Path, step: int, state: str | None = '{"global_step": 1}') -> str:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "adapter_model.safetensors").write_bytes(b"x")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return str(path)


@pytest.mark.parametrize("state", [None, "", '{"global_step": 1', "[]", '"global_step"', "{}", "\udcff"])
def test_not_complete(tmp_path, state):
    folder = Path(checkpoint(tmp_path, 1, None))
    if state is not None:
        (folder / "trainer_state.json").write_bytes(state.encode("utf-8", "surrogateescape"))
    assert not is_complete(folder)
    assert last_checkpoint(tmp_path) is None


def test_the_last_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "none") is None
    nine = checkpoint(tmp_path, 9)
    assert is_complete(nine)
    assert last_checkpoint(tmp_path) == nine
    ten = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, None)
    for name in ("checkpoint-abc", "checkpoint-12-old", "my-checkpoint-13", "checkpoint-"):
        shutil.copytree(ten, tmp_path / name)
    (tmp_path / "checkpoint-14").write_text("a file")
    assert last_checkpoint(tmp_path) == last_checkpoint(str(tmp_path)) == ten


def trainer_in(folder: Path, **changes) -> RefLoraSFTTrainer:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **changes}
    return RefLoraSFTTrainer(
        model=tiny.lora(tiny.llama()),
        args=SFTConfig(**tiny.arguments(folder, **settings)),
        train_dataset=tiny.token_dataset(8),
        processing_class=tiny.tokenizer(),
    )


def test_a_path_that_is_not_complete_is_refused(tmp_path):
    trainer = trainer_in(tmp_path)
    for state, message in ((None, "it has no trainer_state.json"), ("{", "its trainer_state.json, .* is cut short")):
        half = Path(checkpoint(tmp_path, 9, state))
        with pytest.raises(
            ValueError, match=rf"checkpoint-9 is not a complete checkpoint: {message}.* no complete one in"
        ):
            trainer.train(resume_from_checkpoint=half)
        shutil.rmtree(half)
    whole, half = checkpoint(tmp_path, 3), checkpoint(tmp_path, 9, None)
    with pytest.raises(ValueError, match=f"The last complete one, .* is {whole}"):
        trainer.train(resume_from_checkpoint=half)
    with pytest.raises(ValueError, match=f"there is no such folder. The last complete one, .* is {whole}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("resume", [True, "True", "false", None])
def test_what_resumes(tmp_path, resume):
    """On the command line it is a string."""
    trainer_in(tmp_path).train()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    trainer = trainer_in(tmp_path, max_steps=4, save_strategy="no")
    trainer.train(resume_from_checkpoint=resume)
    first = 2 if str(resume).lower() == "true" else 0
    assert [run["from_step"] for run in trainer.run_record.record.runs] == [0, 2][: 1 + bool(first)]
    assert trainer.state.global_step == 4


def test_half_written_checkpoints_do_not_count_for_the_limit(tmp_path):
    """Nor does anything but checkpoints; and what is to be kept stays, however old it is."""
    for step in (9, 7, 8):
        checkpoint(tmp_path, step, None)
    (tmp_path / "checkpoint-best").mkdir()
    trainer_in(tmp_path, max_steps=3, save_total_limit=2).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-best", "checkpoint-2", "checkpoint-3"}


@pytest.mark.parametrize(
    ("seen", "each_node", "chosen"),
    [([[1, 2], [2, 1]], False, 2), ([[1, 2], [1]], True, 1), ([[1], [2]], True, None), ([[], []], False, None)],
)
def test_all_processes_choose_the_same(tmp_path, monkeypatch, seen, each_node, chosen):
    for step in (1, 2):
        checkpoint(tmp_path, step)
    monkeypatch.setattr(checkpoints, "gather_object", lambda steps: seen)
    found = checkpoints.last_common_checkpoint(trainer_in(tmp_path, save_on_each_node=each_node).args)
    assert found == (chosen and str(tmp_path / f"checkpoint-{chosen}"))


def test_a_folder_that_some_nodes_do_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "gather_object", lambda steps: [[1, 2], [], [1, 2], []])
    with pytest.raises(ValueError, match=r"but the processes \[1, 3\] do not see them. Put output_dir on"):
        trainer_in(tmp_path).train(resume_from_checkpoint=True)


def test_the_arguments_keep_their_limit(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=1, save_total_limit=2)
    trainer.train()
    assert trainer.args.save_total_limit == 2
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 2
