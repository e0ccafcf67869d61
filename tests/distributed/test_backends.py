"""DDP, FSDP2 and DeepSpeed in two processes (gloo): one trajectory on all, and what each does of its own."""

import importlib.util
import time

import pytest
import torch
import train_backends
import two_processes


# The record that README shows has ZeRO-0 and 1, too. The cases below have ZeRO-0; ZeRO-1 takes the ways of ZeRO-2.
TRAJECTORIES = ["DDP", "FSDP2", "FSDP2 at load", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"]


@pytest.fixture(scope="module")
def trajectories() -> dict[tuple[str, str], dict]:
    """What benchmarks/trajectories.py measures."""
    backends = [name for name in TRAJECTORIES if train_backends.ZERO or not name.startswith("DeepSpeed")]
    found = train_backends.trajectories.measure(backends, list(train_backends.trajectories.METHODS))
    return {(entry["backend"], entry["method"]): entry for entry in found}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> tuple[dict[str, str | None], ...]:
    """What every case of train_backends.py raised, on either process."""
    out = tmp_path_factory.mktemp("cases")
    done = two_processes.run("train_backends.py", str(out), timeout=500)
    found = tuple(torch.load(out / f"found-{rank}.pt") for rank in range(2))
    return *found, done, time.time() - (out / "found-0.pt").stat().st_mtime


def needs_deepspeed(name: str) -> None:
    if "DeepSpeed" in name and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("method", train_backends.trajectories.METHODS)
@pytest.mark.parametrize("backend", TRAJECTORIES)
def test_one_trajectory_on_every_backend(trajectories, backend, method):
    """Equal to one process with accumulation, to rounding, which LoRA-SB's singular vectors magnify."""
    needs_deepspeed(backend)
    entry = trajectories[backend, method]
    assert entry["equal_on_both"]
    assert entry["loss_difference"] < 5e-6
    assert entry["adapter_difference"] < (3e-5 if method == "LoRA-SB" else 2e-6)


@pytest.mark.slow
def test_the_methods_differ(trajectories):
    """By far more than the bound above; least the two forms of RefLoRA-S."""
    for backend in {backend for backend, _ in trajectories}:
        losses = [torch.tensor(entry["losses"]) for (at, _), entry in trajectories.items() if at == backend]
        for i, left in enumerate(losses):
            for right in losses[:i]:
                assert (left - right).abs().max() > 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", train_backends.CASES)
def test_case(cases, case):
    for found in cases[:2]:
        assert found[case] is None, found[case]


@pytest.mark.slow
def test_cases_need_deepspeed():
    needs_deepspeed("DeepSpeed")
    assert any("DeepSpeed" in case for case in train_backends.CASES)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_other(cases):
    """Where the model is sharded, the launcher does it; it would otherwise wait in a collective for ever."""
    *_, done, seconds = cases
    assert done.returncode != 0
    assert "Broken: in the forward pass of process 1" in done.stderr
    assert seconds < 60
