"""benchmarks/gpu.py in its dry form: every part in miniature on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402


# These change the state of the process (torch.distributed) or run pytest.
ALONE = {"ddp", "fsdp2", "tests"}


@pytest.mark.parametrize("name", [name for name in gpu.PARTS if name not in ALONE])
def test_a_part(name):
    outcome = gpu.perform(name, dry=True)
    if name == "cuda_graph":
        assert outcome == {"status": "skipped", "reason": "there is no CUDA device"}
    else:
        assert outcome["status"] == "ok", outcome
        assert outcome["figures"]


@pytest.mark.slow
def test_the_command(tmp_path):
    """Backends in processes of their own, the record and the table."""
    record = tmp_path / "gpu.json"
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--dry", "--record", record]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--only", "ddp", "fsdp2", "tests"], env=environment, capture_output=True, text=True, check=True
    )
    facts = json.loads(record.read_text(encoding="utf-8"))
    parts = facts["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {"ddp": "ok", "fsdp2": "ok", "tests": "skipped"}
    assert parts["fsdp2"]["figures"] == {"backend": "FSDP2", "difference of the losses": pytest.approx(0, abs=1e-6)}
    assert "no test ran" in parts["tests"]["reason"]
    assert facts["environment"]["versions"]["torch"]
    assert done.stdout.strip() == gpu.table(parts)


def test_a_part_that_takes_too_long_has_failed():
    outcome = gpu.run_part("sync", dry=True, limit=0.2)
    assert (outcome["status"], outcome["reason"]) == ("failed", "took longer than 0 s")


def test_a_part_that_fails_says_why(monkeypatch):
    from on_gpu import speed

    monkeypatch.setattr(speed, "step_cost", lambda setting: 1 / 0)
    outcome = gpu.perform("step_cost", dry=True)
    assert (outcome["status"], outcome["reason"]) == ("failed", "ZeroDivisionError: division by zero")
