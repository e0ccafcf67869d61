"""What the README says is what the code does: its commands, its snippets, its numbers."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import classify_reflora
import dpo_reflora
import pytest
import sft_reflora
import tiny
from accelerate.commands.launch import launch_command_parser
from peft import get_peft_model

from hf_reflora import LoraSbConfig


ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "records"
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import compare_cards  # noqa: E402
import init_cost  # noqa: E402
import side_by_side  # noqa: E402
import step_cost  # noqa: E402
import trajectories  # noqa: E402


README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES_README = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
RECIPES = {f"recipes/{r.__name__}.py": r for r in (sft_reflora, dpo_reflora, classify_reflora)}
LAUNCHES = [
    line.strip()
    for text in (README, RECIPES_README, *(recipe.__doc__ for recipe in RECIPES.values()))
    for line in text.replace("\\\n", " ").splitlines()
    if line.strip().startswith("accelerate launch")
]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def demo_records():
    return compare.load(sorted((RECORDS / "smollm2-135m").glob("*.json")))


@pytest.mark.parametrize("line", LAUNCHES)
def test_launch_commands_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    launch = launch_command_parser().parse_args(line.split()[2:])
    assert launch.config_file is None or Path(launch.config_file).is_file()
    recipe = RECIPES[launch.training_script]
    arguments = [*launch.training_script_args, "--bf16", "false"]
    script, _, *settings = recipe.make_parser().parse_args_and_config(arguments)
    recipe.check(*settings)
    assert script.dataset_name


def test_make_runs_what_the_readme_says(tmp_path):
    """`make demo` is the three lines for people without make, in a virtual environment of its own."""
    made = subprocess.run(
        ["make", "--dry-run", "demo", f"VENV={tmp_path}/venv"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    made = made.replace(f"{tmp_path}/venv/bin/python -m ", "").replace(f"{tmp_path}/venv/bin/", "")
    made = re.sub(r"install --quiet +", "install ", made)
    [lines] = [block for block in re.findall(r"```bash\n(.*?)```", README, re.S) if "pip install" in block]
    assert [line for line in lines.splitlines() if line not in made] == []
    assert len(lines.splitlines()) == 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.split("\n")[-2][:40])
def test_snippets_run(snippet, tmp_path):
    """With a tiny model in place of the Hub's and of what `...` leaves out."""
    from peft import LoraConfig
    from torch.optim import Optimizer
    from trl import SFTConfig, SFTTrainer

    tiny.save(tmp_path)
    model, config = repr(str(tmp_path)), "args=args, "
    snippet = snippet.replace('"HuggingFaceTB/SmolLM2-135M-Instruct",', f"{model}, {config}")
    snippet = snippet.replace("(..., ", f"(model={model}, {config} train_dataset=dataset, ")
    ast.parse(snippet)
    names = {
        "LoraConfig": LoraConfig,
        "SFTTrainer": SFTTrainer,
        "args": SFTConfig(**tiny.arguments(tmp_path / "out", max_steps=2)),
        "dataset": tiny.chat_dataset(),
        "torch": __import__("torch"),
        "peft_model": get_peft_model(tiny.llama(), LoraConfig(r=4, task_type="CAUSAL_LM")),
    }
    exec(snippet, names)
    if "trainer" in names:
        names["trainer"].train()
        assert names["trainer"].state.global_step == 2
    else:
        assert isinstance(names["optimizer"], Optimizer)


def test_demo_table_is_the_records():
    assert compare.table(demo_records()) in README


def test_demo_meets_its_promise():
    """Exact match at least 0.60, valid JSON at least 0.95, at most 12 minutes and 4 GB, from a committed state."""
    record = json.loads((RECORDS / "smollm2-135m" / "reflora-seed0.json").read_text(encoding="utf-8"))
    assert record["scores"]["after"]["exact"] >= 0.60
    assert record["scores"]["after"]["valid_json"] >= 0.95
    assert record["scores"]["rows"] >= 200
    assert record["seconds"]["total"] <= 12 * 60
    assert record["peak_memory_gb"]["host"] <= 4
    assert record["environment"]["uncommitted_changes"] is False
    minutes = record["seconds"]["total"] / 60
    assert f"{minutes:.0f} minutes on 2 CPU cores" in README


def test_trajectories_are_the_record():
    record = json.loads((RECORDS / "trajectories.json").read_text(encoding="utf-8"))
    assert record["environment"]["uncommitted_changes"] is False
    assert {entry["backend"] for entry in record["results"]} == set(trajectories.TWO)
    assert all(entry["equal_on_both"] for entry in record["results"])
    assert trajectories.table(record["results"]) in README


def test_cost_table_is_the_record():
    record = json.loads((RECORDS / "step_cost.json").read_text(encoding="utf-8"))
    assert step_cost.table(record["seconds"]) in README


def test_initialization_tables_are_the_record():
    record = json.loads((RECORDS / "init_cost.json").read_text(encoding="utf-8"))
    assert init_cost.memory_table(record["memory"]) in README
    assert init_cost.svd_table(record["svd"]) in README
    step = record["memory"]["a LoRA training step"]["gb"]
    assert record["memory"]["LoRA-SB"]["gb"] <= step
    assert all(ways["block Krylov"]["missed_energy"] <= 1e-4 for ways in record["svd"].values())


def test_side_by_side_table_is_the_record():
    record = json.loads(side_by_side.RECORD.read_text(encoding="utf-8"))
    assert side_by_side.table(record) in README
    assert f"where the engine chose {record['chosen']} (" in README
    assert record["differences"]["in turn"] == {"alone": 0, "in a batch as large": 0}
    assert record["differences"]["mixed batch"]["in a batch as large"] == 0
    assert record["environment"]["uncommitted_changes"] is False


def test_cards_table_is_the_record():
    record = json.loads(compare_cards.RECORD.read_text(encoding="utf-8"))
    assert compare_cards.table(record["answers"]) in README
    assert record["environment"]["uncommitted_changes"] is False


@pytest.mark.slow
@pytest.mark.parametrize("library", ["hf_reflora", "PEFT", "TRL", "transformers"])
def test_cards_are_as_recorded(library, monkeypatch):
    monkeypatch.setattr(sys, "argv", [compare_cards.__file__])  # the command that the card shows
    record = json.loads(compare_cards.RECORD.read_text(encoding="utf-8"))
    assert compare_cards.answers(compare_cards.LIBRARIES[library]) == record["answers"][library]


def test_export_command_runs(tmp_path):
    """The README's `hf-reflora export …`, on a folder of the same name."""
    [line] = re.findall(r"^ +hf-reflora (export .*)$", README, re.M)
    command, source, target = line.split()
    config = LoraSbConfig(r=4, target_modules=["q_proj"], init_weights=False)
    get_peft_model(tiny.llama(), config).save_pretrained(tmp_path / source)
    program = Path(sys.executable).parent / "hf-reflora"
    done = subprocess.run([program, command, source, target], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "LoRA of rank 4 in 2 layers" in done.stdout
    assert (tmp_path / target / "adapter_model.safetensors").exists()


def test_records_of_unlike_runs_are_not_compared(tmp_path):
    path = RECORDS / "smollm2-135m" / "reflora-seed0.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    (tmp_path / "other.json").write_text(json.dumps({**record, "train_rows": 1}), encoding="utf-8")
    with pytest.raises(SystemExit, match="train_rows is"):
        compare.load([path, tmp_path / "other.json"])
