"""DDP, FSDP2 and DeepSpeed in two processes (gloo): one trajectory on all, and what each does of its own."""

import importlib.util
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import train_backends
import two_processes
from train_backends import trajectories


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, CompletedProcess, float]:
    """Folder and outcome of train_backends.py, and the seconds from its last success to its end."""
    out = tmp_path_factory.mktemp("backends")
    trajectories.base_model().save_pretrained(out / "base")
    done = two_processes.run("train_backends.py", str(out), timeout=550)
    return out, done, time.time() - (out / "found-0.pt").stat().st_mtime


@pytest.fixture(scope="module")
def entries(launched) -> dict[tuple[str, str], dict]:
    """By backend and method, how the training in two processes differs from the one in this process."""
    out, *_ = launched
    for method in trajectories.METHODS:
        torch.save(trajectories.run(trajectories.ONE, method, str(out)), out / f"{trajectories.ONE}-{method}-0.pt")
    backends = [name for name in train_backends.TRAJECTORIES if train_backends.ZERO or "DeepSpeed" not in name]
    return {(b, m): trajectories.compare(out, b, m) for b in backends for m in trajectories.METHODS}


@pytest.fixture(scope="module")
def cases(launched) -> list[dict[str, str | None]]:
    """What every case raised, on either process."""
    return [torch.load(launched[0] / f"found-{rank}.pt") for rank in range(2)]


def needs_deepspeed(name: str) -> None:
    if "DeepSpeed" in name and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("method", trajectories.METHODS)
@pytest.mark.parametrize("backend", train_backends.TRAJECTORIES)
def test_one_trajectory_on_every_backend(entries, backend, method):
    """Equal to one process with accumulation, to rounding, which LoRA-SB's singular vectors magnify."""
    needs_deepspeed(backend)
    entry = entries[backend, method]
    assert entry["equal_on_both"]
    assert entry["loss_difference"] < 5e-6
    assert entry["adapter_difference"] < (3e-5 if method == "LoRA-SB" else 2e-6)


@pytest.mark.slow
def test_the_methods_differ(entries):
    """By far more than the bound above; least the two forms of RefLoRA-S."""
    for backend in {backend for backend, _ in entries}:
        losses = [torch.tensor(entry["losses"]) for (at, _), entry in entries.items() if at == backend]
        for i, left in enumerate(losses):
            for right in losses[:i]:
                assert (left - right).abs().max() > 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", train_backends.CASES)
def test_case(cases, case):
    for found in cases:
        assert found[case] is None, found[case]


@pytest.mark.slow
def test_cases_need_deepspeed():
    needs_deepspeed("DeepSpeed")
    assert any("DeepSpeed" in case for case in train_backends.CASES)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_other(launched):
    """Where the model is sharded, the launcher does it; it would otherwise wait in a collective for ever."""
    _, done, seconds = launched
    assert done.returncode != 0
    assert "Broken: in the forward pass of process 1" in done.stderr
    assert seconds < 60


@pytest.mark.release
def test_the_benchmark_measures_them():
    """As its command does, in processes that it starts itself."""
    [entry] = trajectories.measure(["DDP"], ["RefLoRA"])
    assert entry["equal_on_both"]
    assert entry["loss_difference"] < 5e-6
