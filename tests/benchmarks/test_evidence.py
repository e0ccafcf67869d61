"""The experiments with Adam: the page is what the records say, and every rival trains."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments
from trl import SFTConfig

from hf_reflora.recipes import optimizers
from hf_reflora.recipes.options import RecipeParser
from hf_reflora.sweep.outcomes import Best, Outcome, read_outcomes
from hf_reflora.sweep.plan import read_sweep


ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "benchmarks" / "evidence"
sys.path.insert(0, str(EVIDENCE))
import page  # noqa: E402
import prepare  # noqa: E402
import rivals  # noqa: E402
import train_classify  # noqa: E402
import train_sft  # noqa: E402


def test_the_page_is_what_the_records_say():
    """Otherwise: python benchmarks/evidence/page.py"""
    text = page.PAGE.read_text(encoding="utf-8").split(page.BEGIN)[1].split(page.END)[0]
    assert text.strip() == page.written().strip()


@pytest.mark.parametrize("readme", ["README.md", "benchmarks/README.md"])
def test_the_noise_that_the_readmes_name_is_in_the_records(readme):
    """The same run without and with share_prefix, which differ in rounding."""
    choice, exact = {"learning_rate": 3.16e-3, "seed": 1}, {}
    for outcome in read_outcomes(page.RECORDS / "tool_calls", "loss").values():
        if (outcome.method, outcome.choice) == ("LoRA", choice):
            exact[outcome.options.get("share_prefix", False)] = f"{outcome.scores['exact']:.3f}"
    text = " ".join((ROOT / readme).read_text(encoding="utf-8").split())
    assert f"{exact[False]} and {exact[True]} of the rows exactly with one seed and different rounding" in text


@pytest.mark.parametrize("task", page.TASKS)
def test_every_record_tells_where_its_numbers_come_from(task):
    _, outcomes = page.load(task)
    for outcome in outcomes:
        assert outcome.status in ("finished", "diverged", "failed", "interrupted")
        if outcome.value is not None:
            assert {"commit", "versions", "cpu", "cores"} <= set(outcome.environment)
            assert not outcome.environment["uncommitted_changes"]
            assert len(outcome.evaluations) == 20
    if outcomes:
        assert (page.RECORDS / task / f"{task}.png").exists()


@pytest.mark.parametrize("task", page.TASKS)
def test_the_options_of_every_run_are_the_recipes(task, tmp_path):
    sweep = read_sweep(EVIDENCE / f"{task}.yaml")
    for run in sweep.grid_runs():
        if sweep.recipe.endswith("train_sft.py"):
            parser = RecipeParser(SFTConfig, train_sft.EvidenceArguments)
        else:
            parser = RecipeParser(TrainingArguments, train_classify.EvidenceArguments, lora_task_type="SEQ_CLS")
        (tmp_path / "options.yaml").write_text(yaml.safe_dump(run.options), encoding="utf-8")
        groups = parser.parse_args_and_config(["--config", str(tmp_path / "options.yaml")])
        assert rivals.RivalOptions(*groups).recipe.optimizer in rivals.RivalArguments.optimizer_names


def outcome(method, seed, loss, evaluations):
    return Outcome(
        f"{method}{seed}", method, {"seed": seed}, "finished", "", 60.0, "loss", loss, {"loss": loss}, [], evaluations
    )


def test_comparisons_with_lora_are_of_the_same_seeds():
    lora = Best("LoRA", {}, [outcome("LoRA", s, 1.0 + s, [(10, 3.0), (20, 2.0)]) for s in (1, 2, 3)])
    other = Best("O", {}, [outcome("O", s, 0.5 + s, [(10, 1.9), (20, 1.5)]) for s in (1, 2)])
    assert page.paired(other, lora) == [-0.5, -0.5]
    lines = list(page.comparisons([other, lora]))
    assert lines[2:] == ["| O | -0.5000 ± 0.0000 | 10 |", "| LoRA | – | 20 |"]
    assert page.first_step(lora, 1.0) is None


RIVALS = {
    "adamw": {},
    "loraplus": {"optimizer": "loraplus"},
    "riemannian": {"optimizer": "riemannian"},
    "lorarite": {"optimizer": "lorarite"},
    "reflora_o": {"optimizer": "reflora_o", "delta_schedule": "log", "sides": "B"},
    "vera": {"adapter": "vera"},
}


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_trains_and_is_evaluated_on_all_rows_at_the_end(name, tmp_path, monkeypatch):
    if name == "lorarite" and importlib.util.find_spec("pytorch_optimizer") is None:
        pytest.skip('needs pip install "hf_reflora[evidence]"')
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "model", max_position_embeddings=256)
    rows = [
        json.dumps({"q": f"{i}+1=", "a": json.dumps({"name": "x", "arguments": {"i": i}})}) + "\n" for i in range(12)
    ]
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    options = {"method": "lora", "model_name_or_path": "model", "dataset_name": "data", "lora_r": 4, "bf16": "false"}
    options |= {"prompt_template": "{q}", "completion_template": "{a}", "score": "tool_call", "max_steps": 2}
    options |= {"score_max_new_tokens": 2, "eval_strategy": "steps", "eval_steps": 1, "evaluation_rows": 4}
    options |= {"lora_target_modules": "all-linear", "report_to": "none", "save_strategy": "no", "use_cpu": "true"}
    options |= {"output_dir": "out", "cpu_threads": 1, **RIVALS[name]}
    flat = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    parser = RecipeParser(SFTConfig, train_sft.EvidenceArguments)
    train_sft.main(*parser.parse_args_and_config(flat))
    record = json.loads((tmp_path / "out" / "run_record.json").read_text(encoding="utf-8"))
    losses = [entry["eval_loss"] for entry in record["log"] if "eval_loss" in entry]
    assert len(losses) == 3
    assert record["scores"]["after"]["loss"] == losses[-1] != losses[-2]  # of the same step, but of more rows
    assert set(record["scores"]["before"]) == {"loss", "mean_token_accuracy"}


@pytest.mark.parametrize(("name", "value"), [("optimizer", "sgd"), ("adapter", "dora")])
def test_unknown_rivals(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        train_sft.EvidenceArguments(**{name: value})


def test_the_optimizers_have_the_trainers_settings():
    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    training = SFTConfig("out", learning_rate=3e-3, adam_beta2=0.95, weight_decay=0.1, bf16=False, report_to="none")
    for name in ("loraplus", "riemannian", "reflora_o"):
        recipe = train_sft.EvidenceArguments(optimizer=name)
        make = rivals.make_optimizer if name in rivals.OPTIMIZERS else optimizers.make_optimizer
        optimizer = make(model, training, recipe)
        assert isinstance(optimizer, torch.optim.Optimizer)
        for group in optimizer.param_groups:
            if group["params"]:
                assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.1), name
        rates = {group["lr"] for group in optimizer.param_groups if group["params"]}
        assert rates == ({3e-3, 1.2e-2} if name == "loraplus" else {3e-3})


def test_snips_becomes_calls(tmp_path):
    data = {"PlayMusic": [{"data": [{"text": "play "}, {"text": "Nörd ", "entity": "artist"}, {"text": " now"}]}]}
    (tmp_path / "train_PlayMusic_full.json").write_text(json.dumps(data, ensure_ascii=False), encoding="latin-1")
    (row,) = prepare.utterances(tmp_path / "train_PlayMusic_full.json")
    assert row == {"request": "play Nörd now", "call": '{"name": "PlayMusic", "arguments": {"artist": "Nörd"}}'}
