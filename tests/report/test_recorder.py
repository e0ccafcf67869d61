"""RunRecordCallback in real trainers: what it knows, when it writes, and what it never writes."""

import json
import math
import os
import time
from datetime import datetime
from pathlib import Path

import forks
import huggingface_hub
import peft
import pytest
import tiny
import tiny_trainer
import torch
import train_record
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import load_peft_weights
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_reflora import (
    LoraSbCallback,
    LoraSbConfig,
    LoraSbSFTTrainer,
    RefLoraCallback,
    RefLoraSFTTrainer,
    RefLoraTrainer,
)
from hf_reflora.hub.staging import read_record
from hf_reflora.report import environment as environment_module
from hf_reflora.report.card import render
from hf_reflora.report.diagnostics import diagnostics
from hf_reflora.report.edits import is_edited
from hf_reflora.report.environment import write_json
from hf_reflora.report.record import RECORD_NAME, RunRecord
from hf_reflora.report.recorder import FACTS, RunRecordCallback, dataset_facts, non_default


TOKEN = "hf_" + "aB3" * 11 + "x"
COMMIT = "0123456789abcdef" * 2 + "01234567"
EXAMPLE = {"prompt": "p", "before": "b", "after": "a", "reference": "r"}
LAYERS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "RefLoraSFTTrainer": (RefLoraSFTTrainer, SFTConfig, "reflora", ["trl", "sft", "reflora"]),
    "RefLoraTrainer": (RefLoraTrainer, TrainingArguments, "reflora", ["reflora"]),
    "LoraSbSFTTrainer": (LoraSbSFTTrainer, SFTConfig, "lora_sb", ["trl", "sft", "lora-sb"]),
    "SFTTrainer": (SFTTrainer, SFTConfig, "reflora", None),
    "Trainer": (Trainer, TrainingArguments, "reflora", None),
}


def base(name="org/base"):
    model = tiny.llama()
    model.name_or_path = str(name)
    return model


def fresh(name="org/base", config=LoraConfig, **changes):
    """An adapter that does nothing yet."""
    torch.manual_seed(1)
    return get_peft_model(base(name), config(**{"r": 4, **LAYERS, **changes}))


def make(folder, kind="RefLoraSFTTrainer", model=None, data=None, eval_data=None, more=None, facts=None, **changes):
    cls = KINDS[kind][0]
    plain = kind.endswith("Trainer") and "SFT" not in kind
    more = dict(more or {})
    if kind in ("SFTTrainer", "Trainer"):
        record = RunRecordCallback(**({"method": "reflora"} if facts is None else facts))
        more["callbacks"] = [RefLoraCallback(), record, *more.get("callbacks", [])]
    elif facts is not None:
        more["callbacks"] = [RunRecordCallback(**facts), *more.get("callbacks", [])]
    if model is None:
        model = fresh(config=LoraSbConfig if kind == "LoraSbSFTTrainer" else LoraConfig)
    more["eval_dataset"] = tiny.token_dataset(4, labels=plain) if eval_data is None else eval_data
    return tiny_trainer.build(folder, cls, model, 16 if data is None else data, more, **changes)


def callback_of(trainer) -> RunRecordCallback:
    [callback] = [c for c in trainer.callback_handler.callbacks if isinstance(c, RunRecordCallback)]
    return callback


def read(folder) -> dict:
    return json.loads((Path(folder) / RECORD_NAME).read_text(encoding="utf-8"))


def found_in(folder):
    """By inspect, up to the order of additions."""
    found = diagnostics(PeftConfig.from_pretrained(str(folder)), load_peft_weights(str(folder), device="cpu"))
    assert found["layers"] > 0
    ranks = found.pop("ranks")
    return {**{name: pytest.approx(value, rel=1e-6, abs=1e-7) for name, value in found.items()}, "ranks": ranks}


def losses(record) -> list[float]:
    return [row["loss"] for row in record["log"] if "loss" in row]


# What it knows


class Slow(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        time.sleep(0.06)


@pytest.fixture
def cached(tmp_path, monkeypatch) -> str:
    """The commit of org/base in a cache of its own; v1 is another one."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "models--org--base"
    for name, commit in (("main", COMMIT), ("v1", COMMIT[::-1])):
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / name).write_text(commit)
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text(tiny.llama().config.to_json_string())
    return COMMIT


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_a_run(tmp_path, kind, cached):
    _, _, method, tags = KINDS[kind]
    more = {"callbacks": [Slow()]}
    trainer = make(tmp_path, kind, more=more, seed=7, data_seed=8, lr_scheduler_type="constant")
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    callback_of(trainer).write(tmp_path)
    record = read(tmp_path)

    assert (record["schema"], record["method"], record["init"]) == (2, method, "default")
    if tags:
        assert record["tags"] == tags
    assert record["model"] == record["base_model"] == "org/base"
    assert record["base_revision"] == cached
    config = LoraSbConfig if kind == "LoraSbSFTTrainer" else LoraConfig
    assert record["peft"]["r"] == 4
    assert record["peft"]["target_modules"] == ["down_proj", "q_proj"]
    assert record["peft"]["task_type"] == "CAUSAL_LM"
    assert record["peft"].keys() <= config.__dataclass_fields__.keys()
    assert "lora_alpha" not in record["peft"]
    assert {"learning_rate": 0.01, "max_steps": 4, "lr_scheduler_type": "constant"}.items() <= (
        record["arguments"].items()
    )
    assert record["arguments"]["per_device_train_batch_size"] == 2
    assert not {"adam_beta1", "max_grad_norm", "gradient_accumulation_steps", "hub_token"} & set(record["arguments"])
    assert (record["seed"], record["data_seed"]) == (7, 8)

    assert record["train_rows"] == 16
    assert record["scores"]["rows"] == 4
    assert record["scores"]["before"]["loss"] == before["eval_loss"]
    assert record["scores"]["after"]["loss"] == after["eval_loss"] != before["eval_loss"]
    assert set(record["scores"]["after"]) <= {"loss", "mean_token_accuracy"}

    assert [row["step"] for row in record["log"] if "loss" in row] == [1, 2, 3, 4]
    assert record["log"] == trainer.state.log_history
    assert record["step"] == 4
    assert record.get("tokens") == (4 * 2 * 12 if "SFT" in kind else None)
    assert record["diagnostics"] == found_in(tmp_path)
    assert record["diagnostics"]["layers"] == 4
    assert record["trainable_parameters"] == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert record["trainable_parameters"] == (4 * 16 if config is LoraSbConfig else 4 * (64 + 80) * 2)

    [run] = record["runs"]
    assert (run["from_step"], run["to_step"], run["processes"]) == (0, 4, 1)
    assert datetime.fromisoformat(run["started"]).tzinfo is not None
    assert 0.2 <= run["seconds"] == record["seconds"]["train"] < 300
    assert run["versions"] == record["environment"]["versions"]
    assert record["environment"]["versions"]["peft"] == peft.__version__
    assert record["peak_memory_gb"]["host"] > 0.1
    assert (record["processes"], record["backend"]) == (1, "NO")


def test_tokens_of_a_trainer_that_counts_them(tmp_path):
    make(tmp_path, "Trainer", include_num_input_tokens_seen=True).train()
    assert read(tmp_path)["tokens"] == 4 * 2 * 12


@pytest.mark.parametrize("config", [LoraConfig, LoraSbConfig])
def test_the_written_settings_make_the_config_again(tmp_path, config):
    changes = {"rank_pattern": {"down_proj": 2}, "layers_to_transform": [1], "modules_to_save": ["lm_head"]}
    changes |= {"lora_alpha": 6, "init_lora_weights": "gaussian"} if config is LoraConfig else {"scaling": 2.0}
    model = fresh(config=config, **changes)
    kind = "SFTTrainer" if config is LoraConfig else "LoraSbSFTTrainer"
    trainer = make(tmp_path, kind, model=model)
    written = json.loads(json.dumps(callback_of(trainer).record.peft))
    assert changes.items() <= written.items()
    assert "base_model_name_or_path" not in written  # it is the record's "model", and perhaps a path
    written["base_model_name_or_path"] = model.active_peft_config.base_model_name_or_path
    again = config(**{name: value for name, value in written.items() if name not in ("peft_type", "peft_version")})
    assert again.to_dict() == model.active_peft_config.to_dict()


def test_lora_sb_initialized_from_w0_is_lora_xs(tmp_path):
    trainer = make(tmp_path, "LoraSbSFTTrainer", model=fresh(config=LoraSbConfig, init_weights="lora_xs"))
    assert trainer.run_record.record.method == "lora_xs"


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("RefLoraSFTTrainer", {"callbacks": [LoraSbCallback()]}, ("reflora", "lora_sb")),
        ("RefLoraSFTTrainer", {"reflora": RefLoraCallback("reflora_s")}, ("reflora_s", "default")),
        ("LoraSbSFTTrainer", {}, ("lora", "lora_sb")),
        pytest.param(
            *("RefLoraSFTTrainer", {"callbacks": [LoraSbCallback]}, ("reflora", "lora_sb")),
        ),
    ],
)
def test_method_and_start_of_an_ordinary_lora(tmp_path, kind, more, expected):
    trainer = make(tmp_path, kind, model=fresh(), more=more)
    trainer.train()
    record = read(tmp_path)
    assert (record["method"], record["init"]) == expected


def test_without_a_given_method_the_adapter_tells_it(tmp_path):
    for kind, config, method in (("Trainer", LoraConfig, "lora"), ("SFTTrainer", LoraConfig, "lora")):
        trainer = make(tmp_path, kind, model=fresh(config=config), facts={})
        assert callback_of(trainer).record.method == method
    own = RunRecordCallback(method="reflora")
    model = fresh(config=LoraSbConfig)
    Trainer(model=model, args=TrainingArguments(**tiny.arguments(tmp_path)), callbacks=[own])
    assert own.record.method == "lora_sb"  # what the adapter is wins


def test_a_run_of_transformers_own_trainer_is_not_tagged_as_trl(tmp_path):
    make(tmp_path, "Trainer").train()
    assert "- trl\n" not in render(RunRecord.from_dict(read(tmp_path)))


def test_the_callback_may_be_a_class(tmp_path):
    args = TrainingArguments(**tiny.arguments(tmp_path))
    data = tiny.token_dataset()
    trainer = Trainer(model=fresh(), args=args, train_dataset=data, callbacks=[RunRecordCallback])
    trainer.train()
    assert read(tmp_path)["step"] == 4


def test_our_trainers_take_the_callback_as_a_class(tmp_path):
    trainer = make(tmp_path, more={"callbacks": [RunRecordCallback]})
    assert callback_of(trainer) is trainer.run_record


def test_our_trainers_take_a_given_callback(tmp_path):
    trainer = make(tmp_path, facts={"dataset": "org/data", "method": "reflora_s"})
    assert callback_of(trainer) is trainer.run_record
    trainer.train()
    record = read(tmp_path)
    assert (record["dataset"], record["method"], record["train_rows"]) == ("org/data", "reflora_s", 16)


@pytest.mark.parametrize("kind", ["RefLoraSFTTrainer", "SFTTrainer"])
def test_a_local_folder_is_no_base_model(tmp_path, monkeypatch, kind):
    """Not even one whose path looks like an id."""
    base().save_pretrained(tmp_path / "org" / "base")
    monkeypatch.chdir(tmp_path)
    for name in ("org/base", str(tmp_path / "org" / "base")):
        config = LoraConfig(r=4, **LAYERS)
        trainer = make(tmp_path / "run", kind, model=name, more={"peft_config": config})
        record = callback_of(trainer).record
        assert (record.model, record.base_model) == (name, None)


def test_given_facts_win(tmp_path):
    facts = {"method": "reflora_s", "init": "mine", "tags": ["x"], "model": "it", "base_model": "a/b"}
    facts |= {"base_revision": "c", "arguments": {"lr": 1}, "environment": {"cpu": "abacus"}, "train_rows": 3}
    facts |= {f"dataset{name}": name for name in ("", "_id", "_revision", "_config", "_split", "_fingerprint")}
    assert set(facts) == set(FACTS)
    for kind in ("RefLoraSFTTrainer", "SFTTrainer"):
        make(tmp_path / kind, kind, facts=facts).train()
        record = read(tmp_path / kind)
        assert {name: record[name] for name in facts} == facts
        assert "commit" not in record["runs"][0]


def test_unknown_facts_raise():
    with pytest.raises(ValueError, match="knows no fact named modell, seeds; it takes method, init"):
        RunRecordCallback(modell="a", method="lora", seeds=3)


@pytest.mark.parametrize("kind", ["SFTTrainer", "Trainer"])
def test_a_model_without_adapter_raises_at_train(tmp_path, kind):
    cls, arguments, *_ = KINDS[kind]
    trainer = cls(
        model=tiny.llama(),
        args=arguments(**tiny.arguments(tmp_path)),
        train_dataset=tiny.token_dataset(labels=kind == "Trainer"),
        processing_class=tiny.tokenizer(),
        callbacks=[RunRecordCallback()],
    )
    with pytest.raises(
        ValueError, match=r"got a LlamaForCausalLM without an adapter. Make one by .*peft_config=\.\.\."
    ):
        trainer.train()
    assert not list(tmp_path.glob("**/run_record.json"))


def test_an_adapter_that_transformers_has_added_raises_at_train(tmp_path):
    model = tiny.llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    for callback in (RunRecordCallback(), LoraSbCallback()):
        args = TrainingArguments(**tiny.arguments(tmp_path))
        trainer = Trainer(model=model, args=args, train_dataset=tiny.token_dataset(), callbacks=[callback])
        with pytest.raises(
            ValueError, match=r"LlamaForCausalLM with an adapter that model.add_adapter .*get_peft_model"
        ):
            trainer.train()


def test_a_callback_added_later(tmp_path):
    data = tiny.token_dataset()
    args = TrainingArguments(**tiny.arguments(tmp_path))
    trainer = Trainer(model=fresh(), args=args, train_dataset=data, eval_dataset=data)
    trainer.add_callback(RunRecordCallback())
    trainer.train()
    trainer.evaluate()
    record = callback_of(trainer).record
    assert (record.method, record.base_model, record.step) == ("lora", "org/base", 4)
    assert record.after.keys() == {"loss"}


def test_a_callback_added_later_bears_an_evaluation_first(tmp_path):
    data = tiny.token_dataset()
    trainer = Trainer(model=fresh(), args=TrainingArguments(**tiny.arguments(tmp_path)), eval_dataset=data)
    trainer.add_callback(RunRecordCallback())
    found = trainer.evaluate()
    assert callback_of(trainer).record.scores["before"]["loss"] == found["eval_loss"]


# The data


def test_the_raw_dataset_is_the_one_that_is_named(tmp_path):
    """Not the one that the trainer has tokenized and packed."""
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in tiny.chat_dataset(9)))
    data = load_dataset(
        "json", data_files={"mine": str(tmp_path / "data.jsonl")}, split="mine", cache_dir=str(tmp_path / "cache")
    )
    changes = {"packing": True, "packing_strategy": "wrapped", "max_length": 24}
    trainer = make(tmp_path / "run", data=data, eval_data=tiny.chat_dataset(4), **changes)
    trainer.train()
    record = read(tmp_path / "run")
    assert record["train_rows"] == 9 != len(trainer.train_dataset)
    assert record["dataset_fingerprint"] == data._fingerprint != trainer.train_dataset._fingerprint
    assert record["dataset_split"] == "mine"
    assert not {"dataset", "dataset_id", "dataset_revision", "dataset_config"} & set(record)


@pytest.mark.parametrize("change", [lambda d: d, lambda d: d.select(range(3)), lambda d: d.map(dict)])
def test_facts_of_a_dataset_of_the_hub(tmp_path, change):
    """From where `datasets` has put it, also after a change of it."""
    folder = tmp_path / "org___some-data" / "small" / "0.0.0" / COMMIT
    tiny.token_dataset(5).save_to_disk(tmp_path / "saved")
    folder.mkdir(parents=True)
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    arrow.rename(folder / "some-data-train.arrow")
    data = change(Dataset.from_file(str(folder / "some-data-train.arrow"), split="train"))
    facts = dataset_facts(data)
    assert facts.pop("dataset_fingerprint") == data._fingerprint
    assert facts == {
        "dataset": "org/some-data",
        "dataset_id": "org/some-data",
        "dataset_revision": COMMIT,
        "dataset_config": "small",
        "dataset_split": "train",
        "train_rows": len(data),
    }


@pytest.mark.parametrize("revision", [None, "v1", "v2"])
@pytest.mark.parametrize("by", ["peft", "trainer"])
def test_the_commit_of_the_base_is_the_one_in_the_cache(tmp_path, cached, revision, by):
    model = fresh(revision=revision if by == "peft" else None)
    changes = {"model_init_kwargs": {"revision": revision}} if by == "trainer" else {}
    trainer = make(tmp_path / "run", "SFTTrainer", model=model, **changes)
    expected = {None: cached, "v1": cached[::-1], "v2": None}[revision]
    assert callback_of(trainer).record.base_revision == expected
    trainer = make(tmp_path / "run", "SFTTrainer", model=fresh("org/other"))
    assert callback_of(trainer).record.base_revision is None


@pytest.mark.parametrize("data", [None, [1, 2], {"train": tiny.token_dataset()}], ids=["None", "list", "dict"])
def test_other_data_have_no_facts(data):
    assert dataset_facts(data) == {}


def test_a_stream_has_no_facts(tmp_path):
    stream = tiny.token_dataset(16, labels=False).to_iterable_dataset()
    make(tmp_path, data=stream, eval_data=tiny.token_dataset(4, labels=False)).train()
    record = read(tmp_path)
    assert not {name for name in record if name.startswith("dataset")}
    assert "train_rows" not in record
    assert record["step"] == 4


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({}, {}),
        ({"learning_rate": 5e-5, "seed": 42}, {}),
        ({"lr_scheduler_type": "cosine"}, {"lr_scheduler_type": "cosine"}),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, {"lr_scheduler_kwargs": {"num_cycles": 2}}),
        ({"hub_token": TOKEN, "push_to_hub": False}, {}),
        pytest.param(
            *({"max_grad_norm": None}, {"max_grad_norm": None}),
        ),
    ],
)
def test_arguments_that_are_not_defaults(tmp_path, changes, written):
    common = non_default(TrainingArguments(str(tmp_path)))
    assert common.get("output_dir") == str(tmp_path)
    found = non_default(TrainingArguments(str(tmp_path), **changes))
    assert {k: v for k, v in found.items() if k not in common} == written
    assert json.loads(json.dumps(found)) == found


# Scores


@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_are_before_only_while_the_adapter_does_nothing(tmp_path, kind):
    trainer = make(tmp_path, kind)
    first = trainer.evaluate()
    record = callback_of(trainer).record
    assert record.scores == {"before": record.before, "after": {}, "rows": 4}
    with trainer.model.disable_adapter():
        plain = trainer.evaluate()
    assert first["eval_loss"] == pytest.approx(plain["eval_loss"])
    trainer.train()
    last = trainer.evaluate()
    scores = callback_of(trainer).record.scores
    assert scores["before"]["loss"] == plain["eval_loss"]
    assert scores["after"]["loss"] == last["eval_loss"]


@pytest.mark.parametrize("config", [LoraConfig, LoraSbConfig])
def test_an_adapter_that_acts_already_has_no_before(tmp_path, config):
    model = fresh(config=config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lorasb_R" in name:
                parameter.fill_(0.1)
    trainer = make(tmp_path, "SFTTrainer" if config is LoraConfig else "LoraSbSFTTrainer", model=model)
    found = trainer.evaluate()
    scores = callback_of(trainer).record.scores
    assert scores["before"] == {}
    assert scores["after"]["loss"] == found["eval_loss"]


def test_an_adapter_of_an_embedding_acts_by_A(tmp_path):
    """PEFT starts it with A = 0 and B ≠ 0."""
    for touched, when in ((False, "before"), (True, "after")):
        model = fresh(target_modules=["embed_tokens"])
        if touched:
            tiny.fill_B(model)
        args = TrainingArguments(**tiny.arguments(tmp_path))
        callback = RunRecordCallback()
        Trainer(model=model, args=args, eval_dataset=tiny.token_dataset(4), callbacks=[callback]).evaluate()
        assert {name for name in ("before", "after") if callback.record.scores[name]} == {when}


def test_evaluation_at_the_start_of_training_is_of_the_base(tmp_path):
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    trainer.train()
    record = read(tmp_path)
    rows = [row["eval_loss"] for row in record["log"] if "eval_loss" in row]
    assert len(rows) == 3
    assert record["scores"]["before"]["loss"] == rows[0]
    assert record["scores"]["after"]["loss"] == rows[-1] != rows[0]


def test_several_evaluation_datasets_keep_their_names(tmp_path):
    data = {name: tiny.token_dataset(n, labels=False) for name, n in (("a", 4), ("b", 6))}
    trainer = make(tmp_path, eval_data=data)
    found = trainer.evaluate()
    record = trainer.run_record.record
    assert {name: record.before[name] for name in ("a_loss", "b_loss")} == {
        name: found[f"eval_{name}"] for name in ("a_loss", "b_loss")
    }
    assert record.evaluation_rows == 0  # neither 4 nor 6: a card would give one number for all scores
    assert "evaluation rows" not in render(record)


def test_own_results_are_merged(tmp_path):
    callback = RunRecordCallback()
    callback.update(scores={"before": {"exact": 0.0}}, examples=[{"prompt": "p"}])
    callback.update(scores={"before": {"f1": 0.5}, "after": {"exact": 1.0}}, examples=[])
    assert callback.record.scores == {"before": {"exact": 0.0, "f1": 0.5}, "after": {"exact": 1.0}}
    assert callback.record.examples == []


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("kind", ["RefLoraTrainer", "LoraSbSFTTrainer"])
def test_a_diverged_adapter_is_called_so(tmp_path, caplog, kind, filtered):
    """By default a Trainer logs a NaN loss as the mean of the losses before it, so that the log looks well."""

    class Diverge(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.nan)

    trainer = make(tmp_path, kind, more={"callbacks": [Diverge()]}, logging_nan_inf_filter=filtered)
    trainer.train()
    trainer.save_model()
    record, tensors = RunRecord.load(tmp_path / RECORD_NAME), load_peft_weights(str(tmp_path), device="cpu")
    assert filtered == all(math.isfinite(loss) for _, loss in record.losses)
    assert record.diagnostics["not_finite"] == sum(not t.isfinite().all() for t in tensors.values()) > 0
    assert "values that are not finite" in render(record)
    assert caplog.text.count("the training has diverged, whatever losses are logged") == 1
    finite = make(tmp_path / "finite", kind)
    finite.train()
    assert "not_finite" not in read(tmp_path / "finite")["diagnostics"]


class BestAt(TrainerCallback):
    """Makes the score of one step the best, whatever the model has learned."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_wish"] = float(state.global_step == self.step)


def best(folder, step=2, kind="RefLoraSFTTrainer", **changes):
    changes = {"metric_for_best_model": "wish", "greater_is_better": True, **changes}
    more = {"callbacks": [BestAt(step)]}
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer = make(folder, kind, more=more, load_best_model_at_end=True, **steps, **changes)
    trainer.train()
    assert trainer.state.best_global_step == step
    return trainer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [2, 4, 6])
def test_the_best_model_has_its_step_and_its_scores(tmp_path, kind, step):
    trainer = best(tmp_path, step, kind)
    record = read(tmp_path)
    [row] = [row for row in trainer.state.log_history if row["step"] == step and "eval_loss" in row]
    assert record["step"] == step
    assert record["scores"]["after"]["loss"] == row["eval_loss"]
    assert record["diagnostics"] == found_in(tmp_path / f"checkpoint-{step}")
    assert record["runs"][-1]["to_step"] == 6
    assert record["scores"]["before"] == {}
    if kind not in ("SFTTrainer", "Trainer"):
        trainer.save_model()
        assert {k: v for k, v in read(tmp_path).items() if k not in ("peak_memory_gb", "card")} == {
            k: v for k, v in record.items() if k not in ("peak_memory_gb", "card")
        }


def test_the_best_model_has_its_scores_on_several_evaluation_datasets(tmp_path):
    """Of the step whose weights were loaded, not of the last one."""
    data = {name: tiny.token_dataset(n, labels=False) for name, n in (("a", 4), ("b", 6))}
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    steps |= {"load_best_model_at_end": True, "metric_for_best_model": "wish", "greater_is_better": True}
    trainer = make(tmp_path, eval_data=data, more={"callbacks": [BestAt(2)]}, **steps)
    trainer.train()
    scores = read(tmp_path)["scores"]
    found = trainer.evaluate()
    for name in ("a_loss", "b_loss"):
        assert scores["after"][name] == pytest.approx(found[f"eval_{name}"], abs=1e-6)
        [row] = [row for row in trainer.state.log_history if row["step"] == 6 and f"eval_{name}" in row][:1]
        assert scores["after"][name] != pytest.approx(row[f"eval_{name}"], abs=1e-6)


def test_the_step_is_no_score_of_the_best_model(tmp_path):
    best(tmp_path)
    assert "step" not in read(tmp_path)["scores"]["after"]


def test_tokens_of_the_best_model(tmp_path):
    best(tmp_path)
    assert read(tmp_path)["tokens"] == read(tmp_path / "checkpoint-2")["tokens"] == 2 * 2 * 12


def named(folder, name, cls=RefLoraSFTTrainer):
    """A run whose best step is 2 of 6, of an adapter with this name."""
    model = get_peft_model(base(), LoraConfig(r=4, **LAYERS), adapter_name=name)
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    steps |= {"load_best_model_at_end": True, "metric_for_best_model": "wish", "greater_is_better": True}
    kind = cls.__name__
    trainer = make(folder, kind, model, more={"callbacks": [BestAt(2)]}, **steps)
    trainer.train()
    return trainer


@pytest.mark.parametrize("cls", [RefLoraSFTTrainer, Trainer])
@pytest.mark.parametrize("name", ["default", "other"])
def test_the_record_is_of_the_weights_that_were_loaded(tmp_path, cls, name):
    """transformers does not find a best checkpoint's adapter that is not called "default", and only warns."""
    trainer = named(tmp_path, name, cls)
    assert trainer.state.best_global_step == 2
    trainer.save_model(tmp_path)
    weights = {path.parent.name: load_peft_weights(str(path.parent)) for path in tmp_path.glob("**/adapter_model*")}
    last = 2 if name == "default" else 6
    record = read(tmp_path)
    assert record["step"] == last
    [row] = [row for row in trainer.state.log_history if row["step"] == last and "eval_loss" in row]
    assert record["scores"]["after"]["loss"] == row["eval_loss"]
    at_step = read(tmp_path / f"checkpoint-{last}")
    assert record["diagnostics"] == at_step["diagnostics"]
    if name == "default":
        tiny.assert_same(weights[tmp_path.name], weights["checkpoint-2"])


# The model and the arguments that train, which need not be those that the trainer was made with


def made_anew(folder, cls=RefLoraTrainer, **changes):
    """A trainer that makes its model when training begins, with factors that no other model has."""
    count = iter(range(10, 100))
    args = TrainingArguments(**tiny.arguments(folder, **changes))
    data = tiny.token_dataset()

    def model_init():
        model = fresh()
        tiny.fill_B(model, seed=next(count))
        return model

    more = {} if cls is RefLoraTrainer else {"callbacks": [RefLoraCallback(), RunRecordCallback(method="reflora")]}
    return cls(model_init=model_init, args=args, train_dataset=data, eval_dataset=data, **more)


@pytest.mark.parametrize("cls", [RefLoraTrainer, Trainer])
def test_the_record_is_of_the_model_that_model_init_made_last(tmp_path, cls):
    trainer = made_anew(tmp_path, cls, save_strategy="steps", save_steps=2)
    trainer.model.add_model_tags(["mine"])
    trainer.evaluate()
    for _ in range(2):
        trainer.train()
        trainer.save_model()
        record = read(tmp_path)
        assert record["diagnostics"] == found_in(tmp_path)
        [run] = record["runs"]
        assert (run["from_step"], run["to_step"]) == (0, 4)
        assert record["scores"]["after"] == {}
        assert read(tmp_path / "checkpoint-2")["diagnostics"] == found_in(tmp_path / "checkpoint-2")
    if cls is RefLoraTrainer:
        trainer.create_model_card()
        assert {"reflora", "mine"} <= set(card_of(tmp_path)[1]["tags"])
        assert read_record(tmp_path).step == 4  # raises if the record is of other weights, as a push would


@pytest.mark.parametrize("kind", KINDS)
def test_the_arguments_are_those_that_training_began_with(tmp_path, kind):
    trainer = make(tmp_path, kind, weight_decay=0.1, save_strategy="steps", save_steps=2)
    trainer.args.learning_rate, trainer.args.weight_decay, trainer.args.seed = 3e-3, 0.0, 5
    trainer.train()
    trainer.args.learning_rate = 1.0  # too late to have trained
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        record = read(folder)
        assert record["arguments"]["learning_rate"] == 3e-3
        assert "weight_decay" not in record["arguments"]
        assert record["seed"] == 5


@pytest.mark.parametrize("cls", [RefLoraTrainer, Trainer])
def test_the_trials_of_a_search_are_runs_of_their_own(tmp_path, cls):
    trainer = made_anew(tmp_path, cls, save_strategy="steps", save_steps=2)
    rates = iter([1e-3, 2e-3, 3e-3])
    trainer.hyperparameter_search(n_trials=3, backend="optuna", hp_space=lambda trial: {"learning_rate": next(rates)})
    files = sorted(tmp_path.rglob(RECORD_NAME))
    assert [str(path.parent.relative_to(tmp_path)) for path in files] == [
        f"run-{trial}/checkpoint-{step}" for trial in range(3) for step in (2, 4)
    ]
    for path in files:
        record = read(path.parent)
        assert record["diagnostics"] == found_in(path.parent)
        trial = int(path.parent.parent.name.removeprefix("run-"))
        assert record["arguments"]["learning_rate"] == [1e-3, 2e-3, 3e-3][trial]
        [run] = record["runs"]
        assert (run["from_step"], run["to_step"]) == (0, record["step"])
    trainer.train()  # once more, with the settings of the last trial
    trainer.save_model()
    record = read(tmp_path)
    assert record["diagnostics"] == found_in(tmp_path)
    assert len(record["runs"]) == 1


# Checkpoints


def test_examples_may_lack_the_answers_after_training(tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    trainer.run_record.update(examples=[{"prompt": "p", "before": "b"}])
    trainer.train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoints_record_describes_the_checkpoint(tmp_path, kind):
    trainer = make(tmp_path, kind, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.evaluate()
    trainer.train()
    whole = read(tmp_path)
    for step in (2, 4):
        record = read(tmp_path / f"checkpoint-{step}")
        assert (record["step"], record["runs"][0]["to_step"]) == (step, step)
        assert losses(record) == losses(whole)[:step]
        assert len(losses(record)) == step
        assert record["diagnostics"] == found_in(tmp_path / f"checkpoint-{step}")
        assert record.get("tokens") == (24 * step if "SFT" in kind else None)
        [row] = [row for row in whole["log"] if row["step"] == step and "eval_loss" in row]
        assert record["scores"]["after"]["loss"] == row["eval_loss"]
        assert record["scores"]["before"] == whole["scores"]["before"] != {}
    assert read(tmp_path / "checkpoint-2")["diagnostics"] != found_in(tmp_path / "checkpoint-4")


def test_removed_checkpoints_do_not_come_back(tmp_path):
    make(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert read(tmp_path / "checkpoint-4")["step"] == 4


# Resuming


def half(folder, kind="RefLoraSFTTrainer", **changes):
    """A run of 4 steps with a checkpoint at 2; evaluated before, with an example of the user's."""
    trainer = make(folder, kind, save_strategy="steps", save_steps=2, **changes)
    trainer.evaluate()
    callback_of(trainer).update(examples=[EXAMPLE], scores={"before": {"exact": 0.25}})
    trainer.train()
    return trainer


@pytest.mark.parametrize("by", ["True", "path", "other folder", "argument"])
def test_a_resumed_run_goes_on_with_the_checkpoints_record(tmp_path, by):
    half(tmp_path / "a")
    unbroken = read(tmp_path / "a")
    if by == "True":
        checkpoint, step = True, 4
    else:
        checkpoint, step = str(tmp_path / "a" / "checkpoint-2"), 2
    at_step = read(tmp_path / "a" / f"checkpoint-{step}")
    folder = tmp_path / ("b" if by == "other folder" else "a")
    trainer = make(folder, max_steps=6, save_strategy="steps", save_steps=2)
    if by == "argument":
        trainer.args.resume_from_checkpoint = checkpoint
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    record = read(folder)
    assert record["scores"]["before"] == unbroken["scores"]["before"]
    assert record["scores"]["before"]["exact"] == 0.25
    assert record["examples"] == [EXAMPLE]
    first, second = record["runs"]
    assert (first["from_step"], first["to_step"]) == (0, step)
    assert (second["from_step"], second["to_step"]) == (step, 6)
    assert first == at_step["runs"][0]
    assert record["seconds"]["train"] == pytest.approx(first["seconds"] + second["seconds"], abs=0.11)
    assert record["step"] == 6
    assert len(losses(record)) == 6
    assert losses(record)[:step] == losses(unbroken)[:step]
    assert record["diagnostics"] == found_in(folder / "checkpoint-6")
    assert record["peak_memory_gb"]["host"] >= at_step["peak_memory_gb"]["host"]


@pytest.mark.parametrize("kind", ["SFTTrainer", "Trainer"])
@pytest.mark.parametrize("by", [True, "path"])
def test_a_stock_trainer_resumes_in_its_folder(tmp_path, kind, by):
    half(tmp_path, kind)
    step = 4 if by is True else 2
    make(tmp_path, kind, max_steps=5).train(resume_from_checkpoint=by if by is True else f"{tmp_path}/checkpoint-2")
    record = read(tmp_path)
    assert [(run["from_step"], run["to_step"]) for run in record["runs"]] == [(0, step), (step, 5)]
    assert record["scores"]["before"]["exact"] == 0.25


def test_tokens_of_a_resumed_run(tmp_path):
    half(tmp_path)
    trainer = make(tmp_path, max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    assert read(tmp_path)["tokens"] == 6 * 24


def test_a_resumed_run_without_a_record_before_it(tmp_path):
    half(tmp_path)
    (tmp_path / "checkpoint-2" / RECORD_NAME).unlink()
    make(tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    record = read(tmp_path)
    [run] = record["runs"]
    assert (run["from_step"], run["to_step"]) == (2, 3)
    assert record["scores"]["before"] == {}


def test_two_calls_of_train_in_one_process(tmp_path):
    trainer = half(tmp_path)
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    record = read(tmp_path)
    assert [(run["from_step"], run["to_step"]) for run in record["runs"]] == [(0, 4), (0, 4)]
    assert record["seconds"]["train"] == pytest.approx(sum(run["seconds"] for run in record["runs"]), abs=0.01)
    assert record["scores"]["before"]["exact"] == 0.25
    assert record["diagnostics"] == found_in(tmp_path)


def test_train_and_resume_in_one_process(tmp_path):
    trainer = half(tmp_path)
    trainer.args.max_steps = 6
    trainer.train(resume_from_checkpoint=True)
    record = read(tmp_path)
    assert [(run["from_step"], run["to_step"]) for run in record["runs"]] == [(0, 4), (4, 6)]
    assert record["scores"]["before"]["exact"] == 0.25


@pytest.mark.parametrize("asked", [False, True])
def test_a_fresh_run_in_an_old_folder_starts_afresh(tmp_path, asked):
    """Whatever the arguments ask for: a Trainer resumes only what train() is given."""
    half(tmp_path)
    changes = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")} if asked else {}
    make(tmp_path, **changes).train()
    record = read(tmp_path)
    assert "examples" not in record
    assert record["scores"]["before"] == {}
    [run] = record["runs"]
    assert (run["from_step"], run["to_step"]) == (0, 4)


class Abort(TrainerCallback):
    """Ends the first attempts at their step `at`."""

    def __init__(self, error, at=0, times=1):
        self.error, self.at, self.times = error, at, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at and self.times > 0:
            self.times -= 1
            raise self.error


@pytest.mark.parametrize("kind", KINDS)
def test_attempts_of_auto_find_batch_size_are_no_runs(tmp_path, kind):
    abort = Abort(torch.cuda.OutOfMemoryError("CUDA out of memory."), times=2)
    changes = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
    trainer = make(tmp_path, kind, more={"callbacks": [abort]}, **changes)
    trainer.train()
    record = read(tmp_path)
    assert [(run["from_step"], run["to_step"]) for run in record["runs"]] == [(0, 4)]
    assert record["arguments"]["per_device_train_batch_size"] == trainer.state.train_batch_size < 8


@pytest.mark.parametrize("at", [0, 3])
def test_a_training_that_was_interrupted_and_begun_again(tmp_path, at):
    """In a notebook: the weights have both trainings in them."""
    trainer = make(tmp_path, more={"callbacks": [Abort(KeyboardInterrupt(), at)]})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    record = read(tmp_path)
    runs = [(run["from_step"], run["to_step"]) for run in record["runs"]]
    assert runs == ([(0, 3), (0, 4)] if at else [(0, 4)])
    assert record["seconds"]["train"] == pytest.approx(sum(run["seconds"] for run in record["runs"]), abs=0.11)


# What never reaches the file


def test_secrets_and_the_home_folder_stay_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.argv", ["prog", "--hub_token", "plain-secret"])
    out = tmp_path / "home" / "run"
    trainer = make(
        out,
        hub_token=TOKEN,
        run_name=f"run {TOKEN}",
        model_init_kwargs={"token": "plain-secret", "attn_implementation": "eager"},
        save_strategy="steps",
        save_steps=2,
        facts={"model": str(tmp_path / "home"), "dataset": f"https://user:{TOKEN}@host/data"},
    )
    trainer.run_record.update(examples=[{**EXAMPLE, "prompt": TOKEN, "after": f"see {out}/x"}])
    trainer.run_record.update(nested={"a": [{"password": "p"}]})
    trainer.train()
    trainer.save_model()
    files = [out / RECORD_NAME, out / "checkpoint-2" / RECORD_NAME, out / "README.md"]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert TOKEN not in text
        assert "plain-secret" not in text
        assert str(tmp_path / "home") not in text
    record = read(out)
    assert "hub_token" not in record["arguments"]
    assert record["arguments"]["model_init_kwargs"] == {"token": "***", "attn_implementation": "eager"}
    assert record["arguments"]["run_name"] == "run hf_***"
    assert (record["arguments"]["output_dir"], record["model"]) == ("…/run", "~")
    assert record["examples"] == [{**EXAMPLE, "prompt": "hf_***", "after": "see ~/run/x"}]
    assert record["nested"] == {"a": [{"password": "***"}]}
    assert trainer.args.hub_token == TOKEN


def test_the_command_line_has_no_secrets(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.touch()
    monkeypatch.setattr("sys.argv", [str(script), "--hub_token", "plain-secret", f"--name={TOKEN}", "--lr", "1"])
    make(tmp_path / "run").train()
    assert read(tmp_path / "run")["environment"]["command"][1:] == ["--hub_token", "***", "--name=***", "--lr", "1"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/x", "~/x"),
        ("/home/me", "~"),
        ("--dir=/home/me/x", "--dir=~/x"),
        ("/home/mean/x", "/home/mean/x"),
        ("hf_reflora and hf_transfer", "hf_reflora and hf_transfer"),
        pytest.param(
            *("/data/home/me/x", "/data/home/me/x"),
        ),
        pytest.param(
            *("/home/me:/usr/lib", "~:/usr/lib"),
        ),
        pytest.param(
            *("{'dir': '/home/me'}", "{'dir': '~'}"),
        ),
    ],
)
def test_the_home_folder_becomes_a_tilde(monkeypatch, text, shown):
    monkeypatch.setenv("HOME", "/home/me")
    assert environment_module.without_secrets({"a": [text]}) == {"a": [shown]}


# Whole or not at all


@pytest.mark.parametrize("broken", ["value", "disk"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, broken):
    trainer = make(tmp_path)
    trainer.train()
    old = (tmp_path / RECORD_NAME).read_bytes()
    assert json.loads(old)["step"] == 4
    if broken == "value":
        endless = []
        endless.append(endless)
        trainer.run_record.update(bad=endless)
        error = RecursionError
    else:

        def full(*_):
            raise OSError("No space left on device")

        monkeypatch.setattr(os, "replace", full)
        error = OSError
    with pytest.raises(error):
        trainer.run_record.write(tmp_path)
    assert (tmp_path / RECORD_NAME).read_bytes() == old


def test_a_write_that_fails_leaves_nothing_else(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "record.json", {"bad": object()})
    assert list(tmp_path.iterdir()) == []


def test_the_file_can_be_read_by_others_and_is_json(tmp_path):
    make(tmp_path).train()
    assert (tmp_path / RECORD_NAME).stat().st_mode & 0o777 == 0o644
    assert all(math.isfinite(value) for value in read(tmp_path)["diagnostics"].values() if isinstance(value, float))


def test_the_written_record_is_the_returned_one_and_a_copy(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    written = trainer.run_record.write(tmp_path / "new" / "folder")
    assert written.to_dict() == read(tmp_path / "new" / "folder")
    trainer.state.log_history.clear()
    assert written.losses


# The card beside it

OURS = [kind for kind in KINDS if kind not in ("SFTTrainer", "Trainer")]


def card_of(folder) -> tuple[str, dict]:
    text = (Path(folder) / "README.md").read_text(encoding="utf-8")
    assert not is_edited(text)
    assert text.rstrip().endswith("-->")
    return text, ModelCard(text).data.to_dict()


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("where", [lambda folder: None, str, lambda folder: f"{folder}/../run/"])
def test_the_card_is_written_last(tmp_path, monkeypatch, kind, where):
    """PEFT rewrites README.md when it saves, with the local path as base_model."""
    folder = tmp_path / "run"
    model = fresh(str(tmp_path), config=LoraSbConfig if kind == "LoraSbSFTTrainer" else LoraConfig)
    model.config._name_or_path = str(tmp_path)
    trainer = make(folder, kind, model=model, save_strategy="steps", save_steps=2)
    trainer.train()
    for _ in range(2):
        trainer.save_model(where(folder))
        text, data = card_of(folder)
        assert "- PEFT" not in text
        assert data["library_name"] == "peft"
        assert "base_model" not in data
        assert set(trainer._tag_names) <= set(data["tags"])
        assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
        assert read(folder)["diagnostics"] == found_in(folder)
    with open(folder / "adapter_config.json") as file:
        assert json.load(file)["base_model_name_or_path"] == str(tmp_path)


def test_the_card_names_a_base_of_the_hub(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model()
    _, data = card_of(tmp_path)
    assert data["base_model"] == "org/base"
    assert "base_model:adapter:org/base" in data["tags"]


def test_saving_elsewhere_leaves_the_card_alone(tmp_path):
    trainer = make(tmp_path / "run")
    trainer.train()
    trainer.save_model()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    trainer.save_model(str(tmp_path / "other"))
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("folder", [None, "merged"])
def test_a_merged_model_in_the_trainer_has_no_record(tmp_path, folder):
    """The record is one of the adapter, which is no longer what is saved."""
    trainer = make(tmp_path)
    trainer.train()
    written = read(tmp_path)
    trainer.model = trainer.model.merge_and_unload()
    trainer.save_model(folder and str(tmp_path / folder))
    path = tmp_path / (folder or "")
    assert (path / "model.safetensors").is_file()
    assert not (path / "README.md").exists()
    assert (path / RECORD_NAME).exists() == (folder is None)
    assert read(tmp_path) == written


def test_a_save_elsewhere_has_its_record(tmp_path):
    """Also over an older adapter with its record, such as in a checkpoint."""
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    for folder in ("other", "checkpoint-2"):
        trainer.save_model(str(tmp_path / folder))
        assert (
            read(tmp_path / folder)["diagnostics"]
            == found_in(tmp_path / folder)
            == found_in(tmp_path / "checkpoint-4")
        )


@pytest.mark.parametrize("kind", OURS)
def test_the_token_is_in_no_byte_of_the_output(tmp_path, kind):
    trainer = make(tmp_path, kind, hub_token=TOKEN, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.name == "training_args.bin" for path in files) == 3
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
    saved = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert (saved.hub_token, saved.learning_rate) == (None, 0.01)
    assert trainer.args.hub_token == TOKEN


def test_the_token_is_there_again_after_a_save_that_fails(tmp_path):
    trainer = make(tmp_path / "run", hub_token=TOKEN)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        trainer.save_model(str(tmp_path / "file" / "x"))
    assert trainer.args.hub_token == TOKEN


def test_what_was_said_of_the_card_stays(tmp_path):
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    trainer.create_model_card(tags="one", license="cc-by-4.0", language=["en", "de"], dataset_name="org/data")
    trainer.model.add_model_tags(["two"])
    trainer.train()
    trainer.create_model_card(tags=["three", "one"])
    trainer.save_model()
    text, data = card_of(tmp_path)
    assert (data["license"], data["language"], data["datasets"]) == ("cc-by-4.0", ["en", "de"], ["org/data"])
    assert [tag for tag in data["tags"] if tag in ("one", "two", "three")] == ["one", "two", "three"]
    assert "[org/data](https://huggingface.co/datasets/org/data) (16 rows)" in text
    card = read(tmp_path)["card"]
    assert (card["license"], card["language"], card["tags"]) == ("cc-by-4.0", ["en", "de"], ["one", "two", "three"])
    trainer.create_model_card(license="mit", language="fr", dataset_name=str(tmp_path))
    _, data = card_of(tmp_path)
    assert (data["license"], data["language"]) == ("mit", "fr")
    assert "datasets" not in data


def test_a_title_is_the_cards(tmp_path):
    trainer = make(tmp_path)
    trainer.create_model_card(model_name="My *adapter*")
    trainer.train()
    trainer.save_model()
    assert "\n# My \\*adapter\\*\n" in card_of(tmp_path)[0]


@pytest.mark.parametrize("given", [None, "Mine"])
def test_a_checkpoint_leaves_the_title_alone(tmp_path, given):
    trainer = make(tmp_path / "folder", save_strategy="steps", save_steps=2)
    trainer.create_model_card(model_name=given)
    trainer.train()
    trainer.save_model()
    assert f"\n# {given or 'base with RefLoRA'}\n" in card_of(tmp_path / "folder")[0]


def test_a_wrong_license_raises_and_leaves_the_card(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model()
    before = card_of(tmp_path)
    with pytest.raises(ValueError, match="license must be an id of the Hub"):
        trainer.create_model_card(license=3)
    assert card_of(tmp_path) == before


def test_a_wrong_license_is_not_remembered(tmp_path):
    """Or every later save fails, in the middle of training, too."""
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="license must be an id of the Hub"):
        trainer.create_model_card(license=3)
    trainer.train()


def test_a_base_without_a_name_is_called_unknown(tmp_path):
    trainer = make(tmp_path, model=fresh(""))
    trainer.train()
    trainer.save_model()
    assert "It adapts ``" not in card_of(tmp_path)[0]


@pytest.mark.slow
def test_two_processes_write_one_record(tmp_path):
    forks.run(train_record.train, tmp_path, logs=tmp_path)
    record = read(tmp_path)
    assert (record["processes"], record["runs"][0]["processes"]) == (2, 2)
    assert record["backend"] == "MULTI_CPU"
    assert record["tokens"] == 4 * 2 * 2 * 12
    assert record["diagnostics"] == found_in(tmp_path)
    assert record["step"] == 4
    assert read(tmp_path / "checkpoint-2")["diagnostics"] == found_in(tmp_path / "checkpoint-2")
    written = json.loads((tmp_path / "writes-0.json").read_text())
    assert [Path(p).parent.name for p in written if "checkpoint" in p] == ["checkpoint-2", "checkpoint-4"]
    assert str(tmp_path / RECORD_NAME) in written
    assert json.loads((tmp_path / "writes-1.json").read_text()) == []


def test_a_card_edited_in_the_folder_is_kept(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model()
    path = tmp_path / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace("## Limits", "## My own words"), encoding="utf-8")
    trainer.create_model_card(tags=["mine"])
    assert "## My own words" in path.read_text(encoding="utf-8")
    path.unlink()
    trainer.create_model_card()
    assert "mine" in ModelCard.load(path).data.tags
