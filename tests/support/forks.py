"""Functions in processes of their own, forked from one that has imported everything: no launcher, no imports.

Several are ranks of one job: their environment is the one that torchrun sets, and on the CPU they speak over gloo.
"""

import gc
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch


CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["kill_runs"])
SUPPORT = Path(__file__).parent
PATH = [str(SUPPORT.parents[1]), str(SUPPORT)]


@contextmanager
def _path():
    """The server imports what it preloads by PYTHONPATH, which it reads when the first process is started."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(PATH)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start(function: Callable, *args, processes: int, logs: Path) -> list[BaseProcess]:
    """Starts `function(*args)` in each process; what they print goes to `output-RANK.log` in `logs`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        CONTEXT.Process(target=_run, args=(rank, processes, port, logs, function, args)) for rank in range(processes)
    ]
    with _path():
        for process in ranks:
            process.start()
    return ranks


def _run(rank: int, processes: int, port: int, logs: Path, function: Callable, args: tuple) -> None:
    log = os.open(logs / f"output-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes > 1:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
        os.environ.update({"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    gc.freeze()  # what the fork brought along: train() collects garbage, which would take half a second
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end(processes: Sequence[BaseProcess], timeout: float = 120) -> list[int]:
    """Waits for the processes, as a launcher does: where one has failed, the others are killed after 20 seconds.

    Returns:
        Their exit codes.
    """
    until = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < until:
        if any(process.exitcode for process in processes):
            until = min(until, time.monotonic() + 20)
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def output(logs: Path) -> str:
    """The end of what the processes have printed, for a failure's message."""
    return "\n".join(path.read_text()[-3000:] for path in sorted(logs.glob("output-*.log")))


def run(function: Callable, *args, processes: int = 2, logs: Path, timeout: float = 240) -> None:
    """Runs `function(*args)` in each process; fails with any of them."""
    codes = end(start(function, *args, processes=processes, logs=logs), timeout)
    assert codes == [0] * processes, output(logs)
