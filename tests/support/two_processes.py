"""Scripts in two processes: DDP over gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path


SUPPORT = Path(__file__).parent


def launch(script: str, *arguments: str, timeout: float) -> None:
    """Runs tests/support/`script` by `accelerate launch`; fails with it."""
    done = run(script, *arguments, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


def run(script: str, *arguments: str, timeout: float) -> subprocess.CompletedProcess:
    """The same, and what came of it.

    --cpu would start one process only; the scripts themselves ask for the CPU, which makes it DDP over gloo.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(SUPPORT / script), *arguments]
    path = os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
