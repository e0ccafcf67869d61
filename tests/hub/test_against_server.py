"""Publishing against a Hub of our own: against_server/, in a process for each of the client's upload paths.

huggingface_hub reads its settings at import, so the suite cannot run in this process. To run it alone:
`HUB_TESTS=lfs python -m pytest tests/hub/against_server` (or `xet`).
"""

import contextlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs():
    """Both at once: each is one thread."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "hub" / "against_server"), "-q"]
    command += ["--durations=5", "-p", "no:cacheprovider"]
    with contextlib.ExitStack() as stack:
        started = {
            path: stack.enter_context(
                subprocess.Popen(
                    command,
                    env={**environment, "HUB_TESTS": path},
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for path in ("lfs", "xet")
        }
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(lambda run: run.communicate(timeout=550)[0], started.values()))
        yield {path: (run.returncode, output) for (path, run), output in zip(started.items(), outputs, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("path", ["lfs", "xet"])
def test_suite(runs, path):
    status, output = runs[path]
    assert status == 0, output[-20_000:]
    assert " passed" in output.splitlines()[-1]
    assert "skipped" not in output.splitlines()[-1]
