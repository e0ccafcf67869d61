"""Two processes (DDP over gloo, started by `accelerate launch`) against one process with accumulation."""

import pytest
import tiny
import torch
import train_ddp
import two_processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple]:
    """Per method: rank 0, rank 1, and the same batches in one process."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    two_processes.launch("train_ddp.py", str(two), "1", timeout=500)
    train_ddp.train(one, 2)
    files = [(two, 0), (two, 1), (one, 0)]
    return {name: tuple(torch.load(at / f"{name}-{rank}.pt") for at, rank in files) for name in train_ddp.METHODS}


@pytest.mark.slow
@pytest.mark.parametrize("method", train_ddp.METHODS)
def test_two_processes_are_one_with_accumulation(runs, method):
    first, second, single = runs[method]
    assert (first["processes"], single["processes"]) == (2, 1)
    tiny.assert_same(first["factors"], second["factors"])
    torch.testing.assert_close(torch.tensor(first["rows"]), torch.tensor(single["rows"]), rtol=1e-5, atol=1e-6)
    tiny.assert_same(first["factors"], single["factors"], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_methods_differ(runs):
    final = [runs[name][0]["factors"] for name in train_ddp.METHODS]
    for i, left in enumerate(final):
        for right in final[:i]:
            assert not any(torch.allclose(value, right[name], rtol=1e-3, atol=1e-4) for name, value in left.items())
