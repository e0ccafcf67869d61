"""Sweeps that run: skipped, killed, interrupted, searched and compared, by processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hf_reflora.sweep import checks, command
from hf_reflora.sweep.outcomes import read_outcomes
from hf_reflora.sweep.plan import Sweep
from hf_reflora.sweep.runner import Runner


RECIPE = str(Path(__file__).parents[1] / "support" / "sweep_recipe.py")


@pytest.fixture
def sweep(tmp_path):
    """Makes a sweep of the recipe without work."""

    def make(grid, *, methods=None, options=None, **entries):
        options = {"eval_strategy": "epoch", "method": "lora", **(options or {})}
        return Sweep(
            RECIPE, options=options, grid=grid, methods=methods or {}, output_dir=str(tmp_path / "runs"), **entries
        )

    return make


def starts(folder):
    path = Path(folder, "starts.txt")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def by_rate(outcomes):
    return {outcome.choice["learning_rate"]: outcome for outcome in outcomes}


def test_a_wider_grid_runs_only_what_is_new_and_repeats_what_failed(sweep, tmp_path):
    file = tmp_path / "file"
    grid = {"learning_rate": [1e-3, 0.6], "fail": [str(file)]}
    first = by_rate(Runner(sweep(grid)).run())
    assert [first[rate].status for rate in (1e-3, 0.6)] == ["failed", "failed"]
    assert f"there is no {file}" in first[1e-3].error
    file.touch()
    second = by_rate(Runner(sweep({**grid, "learning_rate": [1e-3, 1e-2, 0.6]})).run())
    assert [second[rate].status for rate in (1e-3, 1e-2, 0.6)] == ["finished", "finished", "diverged"]
    assert (second[1e-2].value, second[0.6].value) == (pytest.approx(0.25), None)
    assert second[1e-2].evaluations == [(2, 1.5)]  # not that after the training, too
    done = len(starts(tmp_path / "runs"))
    assert done == 5
    Runner(sweep(grid)).run()
    assert len(starts(tmp_path / "runs")) == done
    lines = (tmp_path / "runs" / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["status"] for line in lines].count("failed") == 2
    assert len(lines) == done


def test_a_torn_last_line_and_another_metric(sweep, tmp_path):
    Runner(sweep({"learning_rate": [1e-3]})).run()
    with (tmp_path / "runs" / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "torn')
    runner = Runner(sweep({"learning_rate": [1e-3, 1e-2]}, metric="exact"))
    assert by_rate(runner.run())[1e-3].value == pytest.approx(0.8)  # 1 / (1 + 0.25), with no second run
    assert len(starts(tmp_path / "runs")) == 2
    assert len(read_outcomes(tmp_path / "runs", "exact")) == 2
    with pytest.raises(ValueError, match=r"no score 'f1'; they have loss, exact"):
        Runner(sweep({"learning_rate": [1e-3]}, metric="f1")).run()


def start_command(tmp_path, *options):
    command = [sys.executable, "-m", "hf_reflora.sweep.command", RECIPE, "--eval_strategy", "epoch", *options]
    return subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "runs")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_starts(folder, count):
    end = time.monotonic() + 60
    while len(starts(folder)) < count:
        assert time.monotonic() < end
        time.sleep(0.1)


OPTIONS = ("--grid", "learning_rate=1e-3,1e-2", "--method", "lora", "--sleep", "2")


def test_kill_9_loses_nothing(tmp_path):
    killed = start_command(tmp_path, *OPTIONS)
    wait_for_starts(tmp_path / "runs", 1)
    killed.kill()
    killed.wait()
    # The run that was left at work is waited for and collected, not repeated.
    out = start_command(tmp_path, *OPTIONS)
    text, _ = out.communicate(timeout=120)
    assert out.returncode == 0, text
    assert len(starts(tmp_path / "runs")) == len(set(starts(tmp_path / "runs"))) == 2
    outcomes = read_outcomes(tmp_path / "runs", "loss").values()
    assert [outcome.status for outcome in outcomes] == ["finished"] * 2
    assert "| lora | learning_rate 0.001 | 1 | 0.25 |" in text


@pytest.fixture
def heeds_ctrl_c():
    """The processes that the test starts heed Ctrl-C, which a shell's background job ignores, as do all it starts."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_ends_the_run_and_the_same_command_goes_on(sweep, tmp_path):
    interrupted = start_command(tmp_path, *OPTIONS[:-1], "600")
    wait_for_starts(tmp_path / "runs", 1)
    children = psutil.Process(interrupted.pid).children(recursive=True)
    assert any("sweep_recipe" in " ".join(child.cmdline()) for child in children)
    with pytest.raises(RuntimeError, match="Another sweep is at work"):
        Runner(sweep({"learning_rate": [1e-3]})).run()
    os.kill(interrupted.pid, signal.SIGINT)
    text, _ = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 1
    assert "The same command goes on" in text
    assert not psutil.wait_procs(children, timeout=10)[1]
    (outcome,) = read_outcomes(tmp_path / "runs", "loss").values()
    assert outcome.status == "interrupted"


def test_jobs_run_at_the_same_time(sweep):
    outcomes = Runner(sweep({"learning_rate": [1e-3, 1e-2]}, options={"wait": 2}), jobs=2).run()  # each for the other
    assert [outcome.status for outcome in outcomes] == ["finished"] * 2


def test_tpe_searches_a_range_and_goes_on(sweep, tmp_path):
    grid = {"learning_rate": {"low": 1e-5, "high": 1.0}, "seed": [0]}
    assert len(Runner(sweep(grid, trials=2)).run()) == 2
    outcomes = Runner(sweep(grid, trials=4)).run()
    assert len(starts(tmp_path / "runs")) == len(set(starts(tmp_path / "runs"))) == len(outcomes) == 4
    assert all(1e-5 <= outcome.choice["learning_rate"] <= 1 for outcome in outcomes)


def test_fresh_seeds_are_run_at_the_best_setting_and_compared_alone(sweep):
    grid = {"learning_rate": [1e-3, 1e-2, 3e-3], "seed": [0]}
    swept = sweep(grid, methods={"LoRA": {}, "other": {"method": "reflora"}}, fresh_seeds=[1, 2])
    runner = Runner(swept, jobs=2)
    outcomes = runner.run()
    fresh = [(o.method, o.choice["learning_rate"]) for o in outcomes if o.choice["seed"] > 0]
    assert sorted(fresh) == [("LoRA", 3e-3)] * 2 + [("other", 3e-3)] * 2
    command.show(swept, runner)
    table = (runner.folder / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[2].startswith("| LoRA | learning_rate 0.003 | 2 | 0.0155 ± 0.0050 |")
    assert len(outcomes) == 10
    for name in ("learning_rate.png", "loss.png"):
        assert (runner.folder / name).read_bytes()[:4] == b"\x89PNG"


def test_the_budget_starts_no_run_that_would_end_later(sweep, tmp_path):
    runner = Runner(sweep({"learning_rate": [1e-3, 1e-2]}), budget=59)  # each run says that it took 60 s
    assert len(runner.run()) == 1
    assert runner.out_of_time
    assert len(starts(tmp_path / "runs")) == 1


def test_a_run_that_could_not_start_has_failed_and_was_not_interrupted(sweep):
    # argparse ends with the status 2, which is also the number of Ctrl-C's signal.
    [outcome] = Runner(sweep({"learning_rate": [1e-3]}), launcher=["--mixed_precision", "no_such"]).run()
    assert outcome.status == "failed"
    assert "exit status 2" in outcome.error
    assert "no_such" in outcome.error


def test_jobs_out_of_range(sweep):
    with pytest.raises(ValueError, match="jobs must be at least 1"):
        Runner(sweep({"learning_rate": [1e-3]}), jobs=0)


def test_options_that_the_recipe_does_not_take_are_found_before_any_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"The run lora.* cannot be made: .*lerning_rate"):
        command.main(
            "sft --config smollm2-135m/lora --eval_strategy epoch --lerning_rate 1e-3 --grid method=lora".split()
        )
    assert not (tmp_path / "runs").exists()


def test_options_of_one_run_are_not_those_of_the_next():
    """TrlParser keeps what it has read: RefLoRA's warm-up would be an error for LoRA."""
    methods = {"RefLoRA": {"method": "reflora", "reflora_warmup_steps": 3}, "LoRA": {"method": "lora"}}
    checks.check_runs(Sweep("sft", "smollm2-135m/lora", options={"eval_strategy": "epoch"}, methods=methods))


@pytest.mark.slow
def test_a_real_recipe_by_the_command(tmp_path):
    import tiny

    tiny.save(tmp_path / "model")
    rows = [json.dumps({"prompt": f"{i}+1=", "completion": f"{i + 1}"}) + "\n" for i in range(16)]
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    options = {"model_name_or_path": "model", "dataset_name": "data", "lora_target_modules": "all-linear"}
    options |= {"bf16": "false", "max_steps": 2, "eval_strategy": "epoch", "report_to": "none", "save_strategy": "no"}
    flat = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    sweep = ["sweep", "sft", *flat, "--grid", "method=lora,reflora", "learning_rate=1e-3,1e-1"]
    done = subprocess.run(
        [Path(sys.executable).with_name("hf-reflora"), *sweep, "--output_dir", "runs", "--jobs", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("learning_rate 0.1") >= 2
    again = re.search(r"The best run again:\n  (hf-reflora sft .*)\n", done.stdout)[1]
    assert "--learning_rate 0.1" in again
    assert "--method" in again
