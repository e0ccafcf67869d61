"""PEFT's own optimizers in the recipes: which parameters they step on, and how; what excludes them."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from versions import needs

from hf_reflora.recipes import optimizers, sft
from hf_reflora.recipes.options import Options
from hf_reflora.report.escaping import cell


PAPERS = {"loraplus": "2402.12354", "riemannian": "2402.02347", "lora_fa": "2308.03303"}
CASES = {
    "loraplus": ["--optimizer", "loraplus", "--loraplus_lr_ratio", 4, "--method", "lora"],
    "loraplus and reflora": ["--optimizer", "loraplus", "--loraplus_lr_ratio", 4, "--method", "reflora"],
    "loraplus and reflora_s": ["--optimizer", "loraplus", "--loraplus_lr_ratio", 4, "--method", "reflora_s"],
    "riemannian": ["--optimizer", "riemannian", "--method", "lora", "--init", "pissa"],
    "lora_fa": ["--optimizer", "lora_fa", "--method", "lora", "--init", "orthogonal"],
}


@pytest.fixture
def train(data, tmp_path, trainers):
    """Runs the recipe for 4 steps with a checkpoint after 2; returns its trainer."""

    def run(*arguments, output="out"):
        options = {"model_name_or_path": data / "model", "dataset_name": data / "rows.jsonl", "learning_rate": 1e-2}
        options |= {"output_dir": tmp_path / output, "use_cpu": "true", "bf16": "false", "cpu_threads": 1}
        options |= {"lora_r": 4, "lora_target_modules": "all-linear", "per_device_train_batch_size": 4, "max_steps": 4}
        options |= {"save_strategy": "steps", "save_steps": 2, "report_to": "none", "logging_steps": 1}
        options |= {"weight_decay": 0.1, "lr_scheduler_type": "constant"}
        line = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        sft.main(*sft.make_parser().parse_args_and_config([*line, *map(str, arguments)]))
        return trainers[-1]

    return run


RIEMANNIAN = pytest.param("riemannian", marks=needs("peft", "0.21", "the Riemannian optimizer"))


@pytest.mark.parametrize("name", [RIEMANNIAN if name == "riemannian" else name for name in CASES])
def test_a_run_and_a_resumed_one(train, tmp_path, name):
    trainer = train(*CASES[name])
    inner = trainer.optimizer.optimizer  # accelerate wraps it
    rates = {group["lr"] for group in inner.param_groups if group["params"]}
    assert rates == ({1e-2, 4e-2} if name.startswith("loraplus") else {1e-2})
    assert all(group["weight_decay"] == 0.1 for group in inner.param_groups if group["params"])
    if name == "lora_fa":
        assert type(inner).__name__ == "LoraFAOptimizer"
        trained = [p_name for p_name, p in trainer.model.named_parameters() if p.requires_grad]
        assert all(".lora_B." in p_name for p_name in trained)
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    resumed = train(*CASES[name], "--resume_from_checkpoint", "true", output="again")
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (trainer, resumed)]
    assert losses[0] == losses[1]
    start, end, again = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("out/checkpoint-2", "out", "again")
    )
    assert all(torch.equal(tensor, again[key]) for key, tensor in end.items())
    moved = {key for key in end if not torch.equal(end[key], start[key])}
    assert moved == {key for key in end if name != "lora_fa" or ".lora_B." in key}
    record = json.loads((tmp_path / "out" / "run_record.json").read_text(encoding="utf-8"))
    chosen = CASES[name][1]
    assert record["arguments"]["optimizer"] == chosen
    assert record["arguments"].get("loraplus_lr_ratio") == (4 if chosen == "loraplus" else None)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert record["trainable_parameters"] == trained
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert PAPERS[chosen] in card
    assert re.search(rf"^\| optimizer \| {re.escape(cell(chosen))} \|$", card, re.M)


def test_the_first_step_of_lora_plus(train, tmp_path):
    """Adam's first step is the learning rate in every entry, and 4 times that in B."""
    options = ["--max_steps", 1, "--weight_decay", 0, "--init", "orthogonal", "--save_strategy", "no"]
    moved = {}
    for name in ("default", "loraplus"):
        train("--method", "lora", "--optimizer", name, *["--loraplus_lr_ratio", 4] * (name == "loraplus"), *options)
        moved[name] = load_file(tmp_path / "out" / "adapter_model.safetensors")
    train("--method", "lora", "--learning_rate", 1e-12, *options)
    start = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in start.items():
        ratio = 4 if ".lora_B." in key else 1
        torch.testing.assert_close(
            moved["loraplus"][key] - tensor, ratio * (moved["default"][key] - tensor), atol=2e-5, rtol=1e-4
        )


REFUSED = {
    "unknown": (["--optimizer", "sgd"], "optimizer must be one of .*got 'sgd'"),
    "no ratio": (["--optimizer", "loraplus"], "needs loraplus_lr_ratio.*such as 4 or 16; got None"),
    "ratio below 1": (["--optimizer", "loraplus", "--loraplus_lr_ratio", "0.5"], "at least 1.*got 0.5"),
    "ratio unused": (["--loraplus_lr_ratio", "4"], "optimizer default does not use loraplus_lr_ratio"),
    "lora_sb": (["--optimizer", "riemannian", "--method", "lora_sb"], "lora_sb trains R only. Leave optimizer out"),
    "riemannian": (["--optimizer", "riemannian"], "preconditions with A Aᵀ and BᵀB itself, so that reflora has"),
    "lora_fa": (["--optimizer", "lora_fa", "--method", "reflora_s"], "trains no A, so that reflora_s has nothing"),
    "betas": (["--optimizer", "lora_fa", "--method", "lora", "--adam_beta2", "0.9"], "does not use adam_beta2"),
    "dora": (["--optimizer", "lora_fa", "--method", "lora", "--use_dora", "true"], "does not use use_dora"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_excludes_an_optimizer(name):
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        Options(*sft.make_parser().parse_args_and_config(["--bf16", "false", *arguments]))


def test_a_backend_that_shards(train, monkeypatch):
    monkeypatch.setattr(optimizers, "is_replicated", lambda: False)
    with pytest.raises(ValueError, match="optimizer riemannian is made for the parameters as they are before"):
        train("--method", "lora", "--optimizer", "riemannian")
