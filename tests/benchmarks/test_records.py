"""The tables in the pages are the recorded ones, and the records come from committed code."""

import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "records"
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare  # noqa: E402
import compare_cards  # noqa: E402
import init_cost  # noqa: E402
import side_by_side  # noqa: E402
import step_cost  # noqa: E402
import trajectories  # noqa: E402
import whole_step  # noqa: E402


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def read(name: str) -> dict:
    return json.loads((RECORDS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_demo_table_is_the_records(name):
    table = compare.table(compare.load(sorted((RECORDS / "smollm2-135m").glob("*.json"))))
    assert table in page(name)


def test_demo_meets_its_promise():
    """Exact match at least 0.60, valid JSON at least 0.95, at most 6 minutes and 4 GB, from a committed state."""
    record = read("smollm2-135m/reflora-seed0.json")
    assert record["scores"]["after"]["exact"] >= 0.60
    assert record["scores"]["after"]["valid_json"] >= 0.95
    assert record["scores"]["rows"] >= 200
    assert record["seconds"]["total"] <= 6 * 60
    assert record["peak_memory_gb"]["host"] <= 4
    assert record["environment"]["uncommitted_changes"] is False
    readme, seconds = page("README.md"), record["seconds"]
    assert f"{seconds['total'] / 60:.0f} minutes on 2 CPU cores and less than 4 GB" in readme
    assert f"{seconds['total']:.0f} s in all, of which {seconds['train']:.0f} s are training" in readme
    assert f"{record['scores']['rows']} held-out questions" in readme


def test_rows_that_the_page_counts_are_the_records():
    """What benchmarks/README.md says in words about the demo's table."""
    exact, trained = {}, {}
    for method in ("lora", "reflora", "reflora_sb_init", "lora_sb"):
        record = read(f"smollm2-135m/{method}-seed0.json")
        exact[method] = round(record["scores"]["after"]["exact"] * record["scores"]["rows"])
        trained[method] = record["trainable_parameters"]
    text = " ".join(page("benchmarks/README.md").split())
    assert f"answers {exact['reflora'] - exact['lora']} more of the 220 rows exactly than LoRA does" in text
    assert f"and {exact['reflora'] - exact['reflora_sb_init']} more than it does from LoRA-SB's initialization" in text
    assert f"{round(trained['lora'] / trained['lora_sb'])} times fewer" in text
    other = {
        name: read(f"smollm2-135m/settings/{name}.json")["scores"]["after"]["exact"]
        for name in ("lora_sb-lr4e-3", "lora_sb-lr2e-2", "reflora-warmup0")
    }
    assert (
        f"with 4e-3 it answered {other['lora_sb-lr4e-3']:.3f} and with 2e-2 {other['lora_sb-lr2e-2']:.3f} of" in text
    )
    assert f"without that it answered {other['reflora-warmup0']:.3f} " in text


def test_llama_cpp_table_is_the_record():
    pytest.importorskip("gguf")  # the benchmark writes files by it
    import llama_cpp

    record = read("llama_cpp.json")
    assert record["environment"]["uncommitted_changes"] is False
    assert all(row["gap"] < 0.02 for row in record["rows"].values())
    assert llama_cpp.table(record["rows"]) in page("benchmarks/README.md")


def test_trajectories_table_is_the_record():
    record = read("trajectories.json")
    assert record["environment"]["uncommitted_changes"] is False
    assert {entry["backend"] for entry in record["results"]} == set(trajectories.TWO)
    assert all(entry["equal_on_both"] for entry in record["results"])
    assert trajectories.table(record["results"]) in page("benchmarks/README.md")


def test_step_cost_tables_are_the_record():
    record = read("step_cost.json")
    assert record["environment"]["uncommitted_changes"] is False
    assert step_cost.table(record["cases"]) in page("benchmarks/README.md")
    assert step_cost.growth_table(record["growth"]) in page("benchmarks/README.md")
    assert "(records/step_cost.png)" in page("benchmarks/README.md")
    cases = [(case["model"], case["rank"], case["dtype"]) for case in record["cases"]]
    assert cases == step_cost.CASES * 2  # with one thread and with two


def test_whole_step_table_is_the_record():
    record = read("whole_step.json")
    assert record["environment"]["uncommitted_changes"] is False
    assert whole_step.table(record) in page("benchmarks/README.md")


def test_initialization_tables_are_the_record():
    record = read("init_cost.json")
    assert record["environment"]["uncommitted_changes"] is False
    costs = record["memory"]
    assert init_cost.memory_table(costs) in page("benchmarks/README.md")
    assert init_cost.svd_table(record["svd"]) in page("benchmarks/README.md")
    assert all(ways["block Krylov"]["missed_energy"] <= 1e-4 for ways in record["svd"].values())
    assert init_cost.epoch_text(costs) in " ".join(page("benchmarks/README.md").split())


def test_initialization_keeps_within_the_memory_of_training_and_near_one_pass():
    """At most a LoRA's training peak, 1.4 times the time of one pass, and 1 % of an epoch of the paper."""
    costs = read("init_cost.json")["memory"]
    assert costs["LoRA-SB"]["gb"] <= costs["a LoRA training step"]["gb"]
    assert costs["LoRA-SB"]["seconds"] <= 1.4 * costs["LoRA-SB, 1 pass"]["seconds"]
    start, step = init_cost.seconds_per_row(costs)
    assert 50 * start <= 0.01 * 50_000 * step


def test_side_by_side_table_is_the_record():
    record = read("side_by_side.json")
    assert side_by_side.table(record) in page("benchmarks/README.md")
    assert f"where the engine chose {record['chosen']}." in page("benchmarks/README.md")
    assert record["differences"]["in turn"] == {"alone": 0, "in a batch as large": 0}
    assert record["differences"]["mixed batch"]["in a batch as large"] == 0
    assert record["environment"]["uncommitted_changes"] is False


def test_cards_table_is_the_record():
    record = read("cards.json")
    assert compare_cards.table(record["answers"]) in page("model_cards/README.md")
    assert record["environment"]["uncommitted_changes"] is False


OTHERS = [pytest.param(name, marks=pytest.mark.release) for name in ("PEFT", "TRL", "transformers")]


@pytest.mark.parametrize("library", ["hf_reflora", *OTHERS])
def test_cards_are_as_recorded(library, monkeypatch):
    monkeypatch.setattr(sys, "argv", [compare_cards.__file__])  # the command that the card shows
    assert compare_cards.answers(compare_cards.LIBRARIES[library]) == read("cards.json")["answers"][library]


def test_records_of_different_runs_are_not_compared(tmp_path):
    record = read("smollm2-135m/reflora-seed0.json")
    (tmp_path / "other.json").write_text(json.dumps({**record, "train_rows": 1}), encoding="utf-8")
    with pytest.raises(SystemExit, match="train_rows is"):
        compare.load([RECORDS / "smollm2-135m" / "reflora-seed0.json", tmp_path / "other.json"])


def test_every_benchmark_has_its_row():
    """A command in the page for every script, and a link for every record."""
    text = page("benchmarks/README.md")
    assert all(f"python benchmarks/{path.name}" in text for path in (ROOT / "benchmarks").glob("*.py"))
    assert all(f"(records/{path.name})" in text for path in RECORDS.glob("*.json"))
