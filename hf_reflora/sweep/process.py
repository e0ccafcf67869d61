"""One run of a sweep in processes of its own, which a killed sweep leaves behind and finds again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import yaml

from ..report.environment import write_json, write_text
from .plan import RECIPES, PlannedRun


OPTIONS_NAME, LOG_NAME, PROCESS_NAME = "options.yaml", "log.txt", "process.json"
# How a process ends that the user or the system's shutdown stopped: by the signal, or with the shell's 128 + signal.
INTERRUPTED = {status for number in (signal.SIGINT, signal.SIGTERM) for status in (-number, 128 + number)}


def run_process(recipe: str, run: PlannedRun, launcher: list[str], environment: dict[str, str]) -> int:
    """Runs `run` by `accelerate launch`, with its output in `log.txt`, and returns its exit status.

    Args:
        recipe: "sft", "dpo" or "classify", or the path of a script.
        launcher: Further options of `accelerate launch`.
        environment: Environment variables besides those of this process.
    """
    folder = Path(run.options["output_dir"])
    write_text(folder / OPTIONS_NAME, yaml.safe_dump(run.options, sort_keys=False, allow_unicode=True))
    script = ["--module", f"hf_reflora.recipes.{recipe}"] if recipe in RECIPES else [recipe]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *script]
    with (folder / LOG_NAME).open("ab") as log:
        process = subprocess.Popen(
            [*command, "--config", str(folder / OPTIONS_NAME)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
        )
        write_json(folder / PROCESS_NAME, _identity(psutil.Process(process.pid)))
        try:
            return process.wait()
        except KeyboardInterrupt:
            stop(process.pid)
            return -signal.SIGINT


def stop(pid: int) -> None:
    """Ends a process and those that it has started: accelerate's launcher leaves its script running."""
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            pass
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        process.kill()


def wait_for_earlier(folder: Path) -> None:
    """Waits for the process that an earlier sweep, which was killed, has left at work in `folder`."""
    path = folder / PROCESS_NAME
    if not path.exists():
        return
    identity = json.loads(path.read_text(encoding="utf-8"))
    try:
        process = psutil.Process(identity["pid"])
        if _identity(process) == identity:  # otherwise the system has given the number to another process
            process.wait()
    except psutil.NoSuchProcess:
        pass


def last_lines(folder: Path, count: int = 15) -> str:
    """The end of a run's log, without the progress bars."""
    text = (folder / LOG_NAME).read_text(encoding="utf-8", errors="replace")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines()]
    return "\n".join([line for line in lines if line and "%|" not in line][-count:])


def _identity(process: psutil.Process) -> dict[str, Any]:
    return {"pid": process.pid, "created": process.create_time()}
