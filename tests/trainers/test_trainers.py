"""RefLoraTrainer and RefLoraSFTTrainer: construction, logs, cards and what they save; RefLoraArguments."""

import dataclasses
import inspect
import subprocess
import sys

import numpy as np
import pytest
import tiny
import tiny_trainer
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import HfArgumentParser
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config

from hf_reflora import (
    LoraSbSFTTrainer,
    RefLoraArguments,
    RefLoraCallback,
    RefLoraDPOTrainer,
    RefLoraSFTTrainer,
    RefLoraTrainer,
    create_reflora_optimizer,
)
from hf_reflora.reflora import step_plain
from hf_reflora.report.recorder import RunRecordCallback


KINDS = {"Trainer": RefLoraTrainer, "SFTTrainer": RefLoraSFTTrainer}
METRICS = {"balance_gap", "balance_residual", "cond_P", "cond_Q", "norm_A", "norm_B", "fallback"}


def make_trainer(tmp_path, kind="SFTTrainer", model=None, reflora=None, more=None, **changes):
    more = {"eval_dataset": tiny.token_dataset(4, labels=kind == "Trainer"), "reflora": reflora, **(more or {})}
    return tiny_trainer.build(tmp_path, KINDS[kind], model, more=more, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_models_without_pairs_are_refused_at_construction(tmp_path, kind):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapter"):
        make_trainer(tmp_path, kind, model=tiny.llama())
    with pytest.raises(ValueError, match="none has both factors trainable"):
        make_trainer(tmp_path, kind, model=tiny.lora(tiny.llama()).requires_grad_(False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("second", [RefLoraCallback, RefLoraCallback()], ids=["class", "instance"])
def test_a_second_callback_is_refused_at_construction(tmp_path, kind, second):
    with pytest.raises(ValueError, match=r"Pass it as reflora=RefLoraCallback\(\.\.\.\)"):
        make_trainer(tmp_path, kind, more={"callbacks": [second]})


@pytest.mark.parametrize("kind", KINDS)
def test_a_refactoring_optimizer_is_refused_at_construction(tmp_path, kind):
    model = tiny.lora(tiny.llama())
    optimizer = create_reflora_optimizer(model, torch.optim.AdamW, lr=0.01)
    with pytest.raises(ValueError, match="Use one of the two"):
        make_trainer(tmp_path, kind, model, more={"optimizers": (optimizer, None)})


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_is_the_callback_and_nothing_else(tmp_path, kind):
    results, ours = [], KINDS[kind]
    stock = next(cls for cls in ours.__mro__ if cls.__module__.startswith(("transformers", "trl")))
    for cls in (ours, stock):
        settings = RefLoraCallback(interval=2)
        more = {"reflora": settings} if cls is ours else {"callbacks": [settings]}
        trainer = tiny_trainer.build(tmp_path, cls, more=more)
        trainer.train()
        results.append(tiny.trainable(trainer.model))
    tiny.assert_same(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("settings", "has_norm"),
    [
        ({"method": "reflora"}, True),
        ({"method": "reflora_s", "form": "precondition"}, True),
        ({"method": "reflora_s"}, False),
    ],
    ids=["reflora", "reflora_s precondition", "reflora_s rescale"],
)
def test_logged_metrics(tmp_path, kind, settings, has_norm):
    trainer = make_trainer(tmp_path, kind, reflora=RefLoraCallback(**settings), eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.evaluate()
    training = [row for row in trainer.state.log_history if "loss" in row]
    names = {f"reflora/{name}" for name in METRICS | ({"grad_norm"} if has_norm else set())}
    assert len(training) == 4
    assert all({key for key in row if key.startswith("reflora/")} == names for row in training)
    others = [row for row in trainer.state.log_history if "loss" not in row]
    assert any("eval_loss" in row for row in others)
    assert any("train_runtime" in row for row in others)
    assert not any(key.startswith("reflora/") for row in others for key in row)


@pytest.mark.parametrize("method", ["reflora", "reflora_s"])
def test_logged_values_are_those_of_the_final_model(tmp_path, method):
    trainer = make_trainer(tmp_path, "Trainer", reflora=RefLoraCallback(method))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row][-1]
    values = {name: [] for name in METRICS}
    for A, B, _ in tiny.linear_pairs(trainer.model):
        S = tiny.hand_S(A, B, "reflora", eps=1e-5).numpy()
        A, B = A.detach().double().numpy(), B.detach().double().numpy()
        P, Q = A @ A.T, B.T @ B
        values["balance_gap"].append(np.linalg.norm(P - Q) / np.linalg.norm(Q))
        values["balance_residual"].append(np.linalg.norm(S @ P @ S - Q) / np.linalg.norm(Q))
        values["cond_P"].append(np.linalg.cond(P))
        values["cond_Q"].append(np.linalg.cond(Q))
        values["norm_A"].append(np.linalg.norm(A))
        values["norm_B"].append(np.linalg.norm(B))
        values["fallback"].append(0.0)
    for name, value in values.items():
        expected = np.quantile(value, 0.5, method="lower") if name.startswith("cond") else np.mean(value)
        assert logged[f"reflora/{name}"] == pytest.approx(expected, rel=1e-3, abs=1e-4), name
    assert len(values["norm_A"]) == 4


def test_logged_grad_norm_is_the_step_of_sgd(tmp_path):
    model = tiny.lora(tiny.llama())
    before = tiny.trainable(model)
    changes = {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "max_steps": 1}
    trainer = make_trainer(tmp_path, "Trainer", model, **changes)
    trainer.train()
    step = torch.stack([(value - before[name]).norm() for name, value in tiny.trainable(model).items()]).norm() / 0.1
    [row] = [row for row in trainer.state.log_history if "loss" in row]
    assert row["reflora/grad_norm"] == pytest.approx(step.item(), rel=1e-3)
    assert row["grad_norm"] != pytest.approx(step.item(), rel=1e-2)


def test_diagnostics_are_computed_at_logged_steps_only(tmp_path, monkeypatch):
    """Neither at the other steps, nor at any step with diagnostics=False."""
    calls = []
    for owner, name in ((step_plain, "diagnose"), (torch.nn.utils, "get_total_norm")):
        actual = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, n=name, f=actual, **k: (calls.append(n), f(*a, **k))[1])
    for diagnostics, expected in ((True, 2), (False, 0)):
        calls.clear()
        reflora = RefLoraCallback(diagnostics=diagnostics)
        trainer = make_trainer(tmp_path, "Trainer", reflora=reflora, logging_steps=2, max_grad_norm=0.0)
        trainer.train()
        assert trainer.state.global_step == 4
        assert calls.count("diagnose") == calls.count("get_total_norm") == expected
        rows = [row for row in trainer.state.log_history if "loss" in row]
        assert [any(key.startswith("reflora/") for key in row) for row in rows] == [diagnostics] * 2


def test_the_gradient_norm_is_that_of_the_logged_step(tmp_path):
    """However seldom a step is logged and by whichever strategy; a step without preconditioning has none."""
    norms = {}
    for name, changes in {
        "each": {},
        "third": {"logging_steps": 3},
        "epoch": {"logging_strategy": "epoch"},
        "first": {"logging_steps": 100, "logging_first_step": True},
    }.items():
        trainer = make_trainer(tmp_path, "Trainer", **changes)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "reflora/grad_norm" in row]
        norms[name] = {row["step"]: row["reflora/grad_norm"] for row in rows}
    assert set(norms["each"]) == {1, 2, 3, 4}
    for name, steps in (("third", {3}), ("epoch", {4}), ("first", {1})):
        assert set(norms[name]) == steps
        assert norms[name].items() <= norms["each"].items()
    trainer = make_trainer(tmp_path, "Trainer", reflora=RefLoraCallback(interval=2))
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "reflora/grad_norm" in row] == [1, 3]


def test_fallback_is_logged_at_the_start(tmp_path):
    """B = 0 and nothing learned: every S is the identity, and numbers that do not exist are left out."""
    torch.manual_seed(0)
    model = tiny.lora(tiny.llama())
    for _, B, _ in tiny.linear_pairs(model):
        torch.nn.init.zeros_(B)
    trainer = make_trainer(tmp_path, "Trainer", model, learning_rate=0.0)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["reflora/fallback"] == 1.0
    assert row["reflora/norm_B"] == 0.0
    assert "reflora/balance_gap" not in row
    assert all(np.isfinite(value) for key, value in row.items() if key.startswith("reflora/"))


@pytest.mark.parametrize("kind", KINDS)
def test_tags_and_card(trained, kind):
    folder, trainer = trained[kind]
    assert "reflora" in trainer.model.model_tags
    card = ModelCard.load(folder / "README.md")
    assert {"lora", "reflora", *trainer._tag_names} <= set(card.data.tags)
    assert ("trl" in card.data.tags) == (kind == "SFTTrainer")
    assert "https://huggingface.co/papers/2505.18877" in card.text
    assert "zhang2025reflora" in card.text


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, tuple]:
    """Folder and trainer of a run of every kind, saved."""
    runs = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        trainer = make_trainer(folder, kind, save_strategy="steps", save_steps=2)
        trainer.train()
        trainer.save_model()
        runs[kind] = folder, trainer
    return runs


def test_stock_peft(tmp_path, trained):
    """The adapter of a checkpoint needs PEFT only, in a process of its own."""
    tiny.llama().save_pretrained(tmp_path / "base")
    ids, runs = torch.arange(4, 20)[None], {}
    for folder, trainer in trained.values():
        with torch.no_grad():
            runs[str(folder / "checkpoint-4")] = trainer.model.eval()(ids).logits
    assert len(runs) == 2
    torch.save(runs, tmp_path / "logits.pt")
    code = f"""
import sys, torch
torch.set_num_threads(1)
from peft import PeftModel
from transformers import LlamaForCausalLM
for checkpoint, expected in torch.load({str(tmp_path / "logits.pt")!r}).items():
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained({str(tmp_path / "base")!r}), checkpoint)
    with torch.no_grad():
        logits = model(torch.arange(4, 20)[None]).logits
        with model.disable_adapter():
            base = model(torch.arange(4, 20)[None]).logits
    assert (logits - expected).abs().max() <= 1e-6, (logits - expected).abs().max()
    assert (base - expected).abs().max() > 1e-4
assert "hf_reflora" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr


YAML = """
model_name_or_path: tiny
dataset_name: talk
output_dir: {output}
use_peft: true
lora_r: 8
learning_rate: 2.0e-4
report_to: none
use_cpu: true
bf16: false
gradient_checkpointing: false
"""
PARSED = (ScriptArguments, SFTConfig, ModelConfig, RefLoraArguments)


def parse(tmp_path, text):
    (tmp_path / "config.yaml").write_text(YAML.format(output=tmp_path) + text)
    return TrlParser(PARSED).parse_args_and_config(
        ["--config", str(tmp_path / "config.yaml")], fail_with_unknown_args=True
    )


def bases():
    """Each of our trainers with the class of transformers or TRL that it extends."""
    for cls in (RefLoraTrainer, RefLoraSFTTrainer, RefLoraDPOTrainer, LoraSbSFTTrainer):
        yield cls, next(b for b in cls.__mro__ if b.__module__.startswith(("transformers.", "trl.")))


@pytest.mark.parametrize(("cls", "base"), bases(), ids=lambda cls: cls.__name__)
def test_methods_take_what_the_methods_of_the_extended_class_take(cls, base):
    POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
    compared = []
    for name in dir(base):
        theirs, ours = getattr(base, name), getattr(cls, name)
        if not inspect.isfunction(theirs) or ours is theirs or (name.startswith("_") and name != "__init__"):
            continue
        compared.append(name)
        their_signature, our_signature = inspect.signature(theirs), inspect.signature(ours)
        our_signature.bind(*["x"] * sum(p.kind == POSITIONAL for p in their_signature.parameters.values()))
        given = [p.name for p in our_signature.parameters.values() if p.kind == POSITIONAL]
        wanted = [p.name for p in their_signature.parameters.values() if p.kind == POSITIONAL]
        assert all(left == right for left, right in zip(given, wanted, strict=False)), name
        our_signature.bind_partial(**dict.fromkeys(wanted))
    assert {"create_model_card", "push_to_hub", "save_model", "train", "log"} <= {*compared, "log"}


@pytest.mark.parametrize("cls", [RefLoraTrainer, RefLoraSFTTrainer])
def test_the_card_arguments_of_transformers_example_scripts(tmp_path, cls):
    trainer = tiny_trainer.build(tmp_path, cls)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(
        **{"finetuned_from": "org/base", "tasks": ["summarization", "translation"], "language": "en"},
        **{"dataset_tags": ["org/glue", "org/more"], "dataset_args": "mrpc", "dataset": "GLUE MRPC"},
    )
    trainer.save_model()  # what was given once stays
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.base_model, data.pipeline_tag, data.language) == ("org/base", "summarization", "en")
    assert data.datasets == ["org/glue", "org/more"]
    assert "| dataset configuration | mrpc |" in text
    with pytest.raises(TypeError, match="licence"):
        trainer.create_model_card(licence="mit")


def test_empty_card_arguments_say_nothing(tmp_path):
    trainer = tiny_trainer.build(tmp_path, RefLoraTrainer, more={"callbacks": [RunRecordCallback(dataset="org/data")]})
    trainer.train()
    trainer.create_model_card(dataset=[], dataset_tags=[], dataset_args=None, tags=None, finetuned_from="", tasks=[])
    record = trainer.run_record.record
    assert (record.dataset, record.model) == ("org/data", "an unknown base model")
    assert "tags" not in record.card


def test_the_order_of_transformers_arguments(tmp_path):
    trainer = tiny_trainer.build(tmp_path, RefLoraTrainer)
    trainer.train()
    trainer.create_model_card("de", "mit", "mine", "My title")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.language, data.license) == ("de", "mit")
    assert "mine" in data.tags
    assert "# My title" in text


def test_arguments_from_yaml(tmp_path):
    text = "reflora_eps: 1e-4\nreflora_dtype: float64\nreflora_warmup_steps: 100\nreflora_interval: 2\n"
    _, training, model, arguments = parse(
        tmp_path, text + "reflora_smoothness: 3\nreflora_form: precondition\nreflora_diagnostics: false\n"
    )
    assert (training.learning_rate, get_peft_config(model).r) == (2e-4, 8)
    settings = arguments.callback("reflora").settings
    assert dataclasses.asdict(settings) == {
        "method": "reflora",
        "form": "precondition",
        "eps": 1e-4,
        "dtype": "float64",
        "warmup_steps": 100,
        "interval": 2,
        "smoothness": 3.0,
        "diagnostics": False,
    }
    *_, defaults = parse(tmp_path, "")
    for method in ("reflora", "reflora_s"):
        assert defaults.callback(method).settings == RefLoraCallback(method).settings
    *_, rescale = parse(tmp_path, "reflora_form: rescale\n")
    assert rescale.callback("reflora_s").settings.rescales
    with pytest.raises(ValueError, match="needs method='reflora_s'"):
        rescale.callback("reflora")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("reflora_epsilon: 1.0", "reflora_epsilon"),
        ("reflora_eps: 2", r"eps must lie in \(0, 1\], got 2"),
        ("reflora_form: refactor", "form must be one of"),
        ("reflora_dtype: bfloat16", "dtype must be one of"),
        ("reflora_warmup_steps: -1", "warmup_steps must be at least 0"),
        ("reflora_interval: 0", "interval must be at least 1"),
        ("reflora_smoothness: 0", "smoothness must be positive"),
    ],
)
def test_wrong_lines_of_yaml_raise(tmp_path, line, match):
    with pytest.raises(ValueError, match=match):
        parse(tmp_path, line)


def test_wrong_types_on_the_command_line_exit(capsys):
    with pytest.raises(SystemExit):
        HfArgumentParser(RefLoraArguments).parse_args_into_dataclasses(["--reflora_warmup_steps", "many"])
    assert "--reflora_warmup_steps" in capsys.readouterr().err


def test_every_field_is_an_argument_of_the_callback_with_help():
    fields = {field.name: field for field in dataclasses.fields(RefLoraArguments)}
    parameters = dict(inspect.signature(RefLoraCallback).parameters)
    del parameters["method"]
    assert set(fields) == {f"reflora_{name}" for name in parameters}
    for name, parameter in parameters.items():
        assert fields[f"reflora_{name}"].default == parameter.default
        assert len(fields[f"reflora_{name}"].metadata["help"]) > 20
    signature = inspect.signature(create_reflora_optimizer).parameters
    assert all(signature[name].default == parameter.default for name, parameter in parameters.items())


def test_arguments_make_a_trainer(tmp_path):
    arguments = RefLoraArguments(reflora_warmup_steps=3)
    trainer = make_trainer(tmp_path, reflora=arguments.callback("reflora_s"))
    trainer.train()
    assert isinstance(trainer.train_dataset, Dataset)
    assert trainer.reflora.settings.warmup_steps == 3
    rows = [row for row in trainer.state.log_history if "loss" in row]
    ratios = [row["reflora/norm_A"] / row["reflora/norm_B"] for row in rows]
    assert min(ratios[:3]) > 1.2  # balanced by the first step after the warm-up
    assert ratios[3] == pytest.approx(1)
