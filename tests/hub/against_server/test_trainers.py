"""Pushes by the trainers and the recipe: when they start, while they train, when they end."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import saved_adapters
import tiny
import tiny_trainer
import trl.trainer.utils
import yaml
from datasets import load_dataset
from huggingface_hub import HfApi, ModelCard, snapshot_download
from local_hub import BOTH_UPLOAD_PATHS
from peft import LoraConfig, PeftModel
from trl import SFTConfig

from hf_reflora import LoraSbConfig, LoraSbSFTTrainer, PushError, RefLoraSFTTrainer, RefLoraTrainer
from hf_reflora.cli import main
from hf_reflora.hub import adapter, staging
from hf_reflora.recipes import sft
from hf_reflora.report import record, recorder
from hf_reflora.trainers import mixin


ROOT = Path(__file__).parents[3]
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "run_record.json", "training.png"}


def make_trainer(folder, cls=RefLoraSFTTrainer, **settings):
    settings = {"push_to_hub": True, "hub_model_id": "me/adapter", **settings}
    if cls is RefLoraTrainer:
        return tiny_trainer.build(folder, cls, **settings)
    peft = LoraSbConfig(r=4, init_weights=True) if cls is LoraSbSFTTrainer else LoraConfig(r=4)
    peft.target_modules, peft.task_type = {"q_proj", "v_proj"}, "CAUSAL_LM"
    return tiny_trainer.build(folder, cls, tiny.llama(), tiny.chat_dataset(), {"peft_config": peft}, **settings)


def titles(server, repo_id="me/adapter"):
    return [commit["title"] for commit in server.commits(repo_id)]


def same_weights(server, folder, path="adapter_model.safetensors"):
    return server.read("me/adapter", path) == (Path(folder) / "adapter_model.safetensors").read_bytes()


def spies(monkeypatch) -> Counter:
    """Counts what is made for a push; each call goes through."""
    counts = Counter()

    def count(module, name):
        original = getattr(module, name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for module, names in (
        (mixin, ("plot", "render")),
        (staging, ("plot", "diagnostics")),
        (adapter, ("render",)),
        (recorder, ("diagnostics",)),
        (record, ("write_json",)),
    ):
        for name in names:
            count(module, name)
    return counts


@pytest.mark.parametrize("cls", [RefLoraSFTTrainer, RefLoraTrainer, LoraSbSFTTrainer])
@pytest.mark.parametrize("by", ["push_to_hub", "save_model"])
def test_record_plot_and_card_are_made_once_for_a_push(server, tmp_path, monkeypatch, cls, by):
    trainer = make_trainer(tmp_path, cls, hub_strategy="end")
    trainer.train()
    counts = spies(monkeypatch)
    getattr(trainer, by)()
    # On the Hub a LoRA-SB adapter is an ordinary LoRA, whose card says so.
    renders = 2 if cls is LoraSbSFTTrainer else 1
    assert counts == {"plot": 1, "diagnostics": 1, "write_json": 1, "render": renders}
    assert json.loads(server.read("me/adapter", "run_record.json")) == json.loads(
        (tmp_path / "run_record.json").read_text()
    )
    assert server.read("me/adapter", "training.png") == (tmp_path / "training.png").read_bytes()
    same_card = server.read("me/adapter", "README.md") == (tmp_path / "README.md").read_bytes()
    assert same_card == (cls is not LoraSbSFTTrainer)


def test_record_plot_and_card_are_made_once_for_a_checkpoint(server, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, hub_always_push=True)
    counts = spies(monkeypatch)
    trainer.train()
    # Two checkpoints; and when training ends its record is written into output_dir, where the adapter is saved next.
    assert counts == {"plot": 2, "render": 2, "diagnostics": 3, "write_json": 3}
    assert not (tmp_path / "README.md").exists()


def test_what_the_hub_adds_to_a_card_is_in_the_saved_one(server, tmp_path):
    front_matter = "---\nlicense: cc-by-4.0\nlanguage: en\ntags:\n- poetry\n---\n"
    HfApi().create_repo("me/adapter")
    HfApi().upload_file(path_or_fileobj=front_matter.encode(), path_in_repo="README.md", repo_id="me/adapter")
    trainer = make_trainer(tmp_path, push_to_hub=False)
    trainer.train()
    trainer.push_to_hub(tags=["mine"], language="de")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.language) == ("cc-by-4.0", "de")
    assert {"mine", "poetry"} <= set(card.data.tags)
    assert card.content.encode() == server.read("me/adapter", "README.md")
    assert 'from_pretrained(base), "me/adapter")' in card.content


def test_a_push_that_is_refused_at_once_has_saved_the_adapter(server, tmp_path):
    trainer = make_trainer(tmp_path, push_to_hub=False, hub_model_id="acme/adapter")
    trainer.train()
    with pytest.raises(PushError, match="no organisation acme"):
        trainer.push_to_hub()
    assert ADAPTER <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("cls", [RefLoraSFTTrainer, RefLoraTrainer, LoraSbSFTTrainer])
def test_one_commit_at_the_end(server, tmp_path, cls):
    trainer = make_trainer(tmp_path, cls, hub_strategy="end", save_strategy="steps", save_steps=2)
    trainer.train()
    assert titles(server) == ["initial commit"]
    commit = trainer.push_to_hub(tags=["mine"], license="mit", dataset_name="me/data")
    assert commit.oid == server.commits("me/adapter")[0]["oid"]
    assert titles(server) == ["End of training", "initial commit"]
    files = server.files("me/adapter")
    assert set(files) >= ADAPTER
    assert not [name for name in files if "training_args" in name or name.startswith("checkpoint") or "optim" in name]
    data = yaml.safe_load(server.read("me/adapter", "README.md").decode().split("---\n")[1])
    assert {"mine", *cls._tag_names} <= set(data["tags"])
    assert (data["license"], data["datasets"], data["library_name"]) == ("mit", ["me/data"], "peft")
    record = json.loads(server.read("me/adapter", "run_record.json"))
    assert record["step"] == 4
    if cls is LoraSbSFTTrainer:
        assert same_weights(server, tmp_path, "native/adapter_model.safetensors")
        loaded = PeftModel.from_pretrained(tiny.llama(), "me/adapter")
        difference = saved_adapters.logits(loaded) - saved_adapters.logits(trainer.model)
        assert difference.abs().max() < 1e-5
    else:
        assert same_weights(server, tmp_path)
    assert trainer.push_to_hub().oid == commit.oid


def test_a_push_of_the_stock_kind_by_save_model(server, tmp_path):
    trainer = make_trainer(tmp_path, hub_strategy="end")
    trainer.train()
    trainer.save_model()
    assert titles(server) == ["Model save", "initial commit"]
    assert same_weights(server, tmp_path)


def test_a_push_that_does_not_block(server, tmp_path):
    trainer = make_trainer(tmp_path, hub_strategy="end")
    trainer.train()
    future = trainer.push_to_hub(blocking=False)
    assert future.result(60).oid == server.commits("me/adapter")[0]["oid"]


def test_push_without_push_to_hub(server, tmp_path):
    trainer = make_trainer(tmp_path / "adapter", push_to_hub=False, hub_model_id=None)
    trainer.train()
    assert server.state() == {}
    trainer.push_to_hub(private=True, revision="dev")
    assert server.state()["me/adapter"]["visibility"] == "private"
    assert len(server.commits("me/adapter", "dev")) == 2
    trainer.push_to_hub(create_pr=True)
    assert len(server.commits("me/adapter", "refs/pr/1")) == 2
    assert titles(server) == ["initial commit"]


@BOTH_UPLOAD_PATHS
def test_checkpoints_in_the_background(server, tmp_path):
    """`every_save`: the adapter of each checkpoint; each commit has the record of its own step."""
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, hub_always_push=True)
    trainer.train()
    assert titles(server) == ["Training in progress, step 4", "Training in progress, step 2", "initial commit"]
    steps = []
    for commit in server.commits("me/adapter")[:2]:
        path = HfApi().hf_hub_download("me/adapter", "run_record.json", revision=commit["oid"])
        steps.append(json.loads(Path(path).read_text())["step"])
    assert steps == [4, 2]
    assert same_weights(server, tmp_path / "checkpoint-4")
    assert not list(tmp_path.glob(".push-*/*"))


@BOTH_UPLOAD_PATHS
@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_training_goes_on_from_a_checkpoint_on_the_hub(server, tmp_path, strategy):
    settings = {"save_strategy": "steps", "save_steps": 2, "hub_strategy": strategy, "hub_always_push": True}
    settings |= {"hub_token": server.tokens["me"]}
    whole = make_trainer(tmp_path / "a", **settings)
    whole.train()
    names = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-2", "checkpoint-4"]}[strategy]
    found = {name.split("/")[0] for name in server.files("me/adapter") if "/" in name}
    assert found == set(names)
    state = {f"{names[0]}/{name}" for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")}
    assert state <= set(server.files("me/adapter"))
    for path in server.files("me/adapter"):
        assert "training_args" not in path
        assert server.tokens["me"].encode() not in server.read("me/adapter", path)
    if strategy == "all_checkpoints":
        folder = snapshot_download("me/adapter", local_dir=tmp_path / "hub")
        again = make_trainer(tmp_path / "b", push_to_hub=False)
        again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        tiny.assert_same(tiny.trainable(again.model), tiny.trainable(whole.model))
        runs = again.run_record.record.runs
        assert [(run["from_step"], run["to_step"]) for run in runs] == [(0, 2), (2, 4)]


def test_a_failed_push_in_the_background_is_made_good_at_the_end(server, tmp_path):
    trainer = make_trainer(
        tmp_path, save_strategy="steps", save_steps=2, hub_strategy="all_checkpoints", hub_always_push=True
    )
    server.fault("/commit/", status=403, times=2)
    trainer.train()
    assert titles(server) == ["Training finished", "initial commit"]
    assert {"checkpoint-2/optimizer.pt", "checkpoint-4/optimizer.pt", *ADAPTER} <= set(server.files("me/adapter"))
    assert same_weights(server, tmp_path)


def test_a_push_that_cannot_be_made_good_is_an_error_at_the_end(server, tmp_path, monkeypatch):
    """Everything is saved by then, and the command in the message finishes the job."""
    trainer = make_trainer(tmp_path / "run of mine", save_strategy="steps", save_steps=2, hub_always_push=True)
    server.fault("/commit/", status=403, times=-1)
    with pytest.raises(PushError) as caught:
        trainer.train()
    assert trainer.state.global_step == 4
    assert titles(server) == ["initial commit"]
    server.mend()
    command = str(caught.value).split("this finishes it: ")[1]
    [*program, folder, repo_id] = re.fullmatch(r"(hf-reflora) (push) '(.*)' (\S+)", command).groups()
    assert program == ["hf-reflora", "push"]
    main(["push", folder, repo_id])
    assert same_weights(server, tmp_path / "run of mine")
    assert json.loads(server.read("me/adapter", "run_record.json"))["step"] == 4


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_the_command_in_the_message_pushes_the_checkpoints_too(server, tmp_path, strategy):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, hub_strategy=strategy, hub_always_push=True)
    server.fault("/commit/", status=403, times=-1)
    with pytest.raises(PushError) as caught:
        trainer.train()
    server.mend()
    first, *others = str(caught.value).split("this finishes it: ")[1].split(" && ")
    main(first.split()[1:])
    for command in others:
        done = subprocess.run([Path(sys.executable).with_name("hf"), *command.split()[1:]], capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    names = {"last-checkpoint"} if strategy == "checkpoint" else {"checkpoint-2", "checkpoint-4"}
    files = set(server.files("me/adapter"))
    assert {f"{name}/optimizer.pt" for name in names} <= files
    assert not any("training_args.bin" in name for name in files)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hub_model_id": "acme/adapter"}, "no organisation acme"),
        ({"hub_token": "reader"}, "may only read"),
        ({"hub_token": "nobody"}, "the token is not valid"),
        ({"hub_model_id": "me/ad apter"}, "cannot be the name of a repository"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_training(server, tmp_path, settings, message):
    if "hub_token" in settings:
        settings = {"hub_token": server.tokens.get(settings["hub_token"], "hf_nobody")}
    with pytest.raises(PushError, match=message):
        make_trainer(tmp_path, **settings)
    assert server.state() == {}


def test_another_base_model_is_refused_before_training(server, tmp_path):
    readme = b"---\nbase_model: me/larger\nlibrary_name: peft\n---\n"
    HfApi().create_repo("me/adapter")
    for name, content in (("README.md", readme), ("adapter_config.json", b"{}")):
        HfApi().upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="me/adapter")
    tiny.llama().push_to_hub("me/base")
    with pytest.raises(PushError, match="holds an adapter of me/larger, this one is of me/base"):
        RefLoraSFTTrainer(
            model="me/base",
            args=SFTConfig(**tiny.arguments(tmp_path, push_to_hub=True, hub_model_id="me/adapter")),
            train_dataset=tiny.chat_dataset(),
            processing_class=tiny.tokenizer(),
            peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
        )


def test_the_record_names_commits_of_model_and_data(server, tmp_path):
    tiny.llama().push_to_hub("me/base")
    tiny.chat_dataset().push_to_hub("me/data")
    trainer = RefLoraSFTTrainer(
        model="me/base",
        args=SFTConfig(**tiny.arguments(tmp_path, push_to_hub=True, hub_model_id="me/adapter")),
        train_dataset=load_dataset("me/data", split="train"),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
    )
    trainer.train()
    trainer.push_to_hub()
    record = json.loads(server.read("me/adapter", "run_record.json"))
    assert (record["base_model"], record["base_revision"]) == ("me/base", server.commits("me/base")[0]["oid"])
    revision = server.commits("datasets/me/data")[0]["oid"]
    assert (record["dataset_id"], record["dataset_revision"]) == ("me/data", revision)
    assert record["dataset_split"] == "train"
    assert record["train_rows"] == 8
    data = yaml.safe_load(server.read("me/adapter", "README.md").decode().split("---\n")[1])
    assert (data["base_model"], data["datasets"]) == ("me/base", ["me/data"])
    assert "base_model:adapter:me/base" in data["tags"]


@pytest.fixture
def recipe(server, tmp_path) -> list[str]:
    """The recipe's options, with a model and a dataset of the Hub."""
    tiny.llama().push_to_hub("me/base")
    tiny.tokenizer().push_to_hub("me/base")
    tiny.chat_dataset(16).push_to_hub("me/data")
    options = ["--method", "reflora", "--model_name_or_path", "me/base", "--dataset_name", "me/data"]
    options += ["--output_dir", str(tmp_path / "out"), "--bf16", "false", "--use_cpu", "true", "--cpu_threads", "1"]
    options += ["--lora_target_modules", "q_proj", "v_proj", "--max_steps", "3", "--logging_steps", "1"]
    options += ["--per_device_train_batch_size", "2", "--report_to", "none"]
    return [*options, "--push_to_hub", "--hub_model_id", "team/adapter", "--hub_strategy", "end"]


def assert_pushed(server, processes: int, printed: str) -> None:
    assert len(titles(server, "team/adapter")) == 2
    record = json.loads(server.read("team/adapter", "run_record.json"))
    assert (record["processes"], record["step"]) == (processes, 3)
    assert record["arguments"]["hub_model_id"] == "team/adapter"
    assert record["base_revision"] == server.commits("me/base")[0]["oid"]
    assert record["dataset_revision"] == server.commits("datasets/me/data")[0]["oid"]
    card = server.read("team/adapter", "README.md").decode()
    assert "# adapter" in card
    assert server.tokens["me"] not in card + json.dumps(record) + printed


def test_the_recipe_in_two_processes_pushes_once(server, recipe, tmp_path):
    command = [Path(sys.executable).parent / "accelerate", "launch", "--multi_gpu", "--main_process_port", "0"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [ROOT / "recipes" / "sft_reflora.py", *recipe]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Pushed: {server.url}/team/adapter/commit/" in done.stdout
    assert_pushed(server, 2, done.stdout + done.stderr)


def test_the_recipes_push_is_refused_and_finished(server, recipe, tmp_path, monkeypatch, capfd):
    """The error, with which a command fails, names the command that finishes it."""
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", trl.trainer.utils._use_triton)  # main sets it for good
    server.fault("/commit/", status=403, body={"error": "Forbidden"}, times=1)
    with pytest.raises(PushError, match=f"this finishes it: hf-reflora push {tmp_path}/out team/adapter"):
        sft.main(*sft.make_parser().parse_args_and_config(recipe))
    assert titles(server, "team/adapter") == ["initial commit"]
    main(["push", str(tmp_path / "out"), "team/adapter"])
    assert_pushed(server, 1, "".join(capfd.readouterr()))
