"""Publishing against a Hub of our own: against_server/, in a process of its own.

huggingface_hub reads its settings at import, so these tests cannot run in this process. To run them alone:
`HUB_TESTS=xet python -m pytest tests/hub/against_server`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_suite():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "tests/hub/against_server", "-q", "-p", "no:cacheprovider"]
    environment["HUB_TESTS"] = "xet"
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=550)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout[-20_000:]
    assert " passed" in last
    assert "skipped" not in last
