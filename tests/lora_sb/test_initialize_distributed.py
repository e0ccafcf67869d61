"""LoRA-SB's initialization in two processes (gloo) against one."""

import re
from pathlib import Path

import forks
import init_ddp
import pytest
import tiny
import torch


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """What two processes and one process have written."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    forks.run(init_ddp.main, two, logs=two)
    init_ddp.train(one)
    return two, one


@pytest.mark.slow
@pytest.mark.parametrize("case", init_ddp.CASES)
def test_two_processes_are_one(folders, case):
    """Bit-identical factors in both processes, equal to those of one process on the same samples."""
    two, one = folders
    first, second, single = (torch.load(at / f"{case}-{rank}.pt") for at, rank in ((two, 0), (two, 1), (one, 0)))
    assert (first["processes"], single["processes"]) == (2, 1)
    assert len(first["start"]) == (8 if case == "lora" else 12)
    tiny.assert_same(first["start"], second["start"])
    tiny.assert_same(first["end"], second["end"])
    for name, value in single["start"].items():
        assert value.any()
        assert (first["start"][name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.mark.slow
def test_samples_are_shared_out(folders):
    """Every sample once, in one process or the other."""
    two, one = folders
    first, second, single = (torch.load(at / f"one pass-{i}.pt")["seen"] for at, i in ((two, 0), (two, 1), (one, 0)))
    assert (len(first), len(second), len(single)) == (4, 3, init_ddp.SAMPLES)
    assert sorted(first + second) == sorted(single)
    assert torch.load(two / "one sample-1.pt")["seen"] == []
    for rank, seen in enumerate((first, second)):  # in one pass, too
        assert torch.load(two / f"block by block-{rank}.pt")["seen"] == seen


@pytest.mark.slow
def test_all_processes_go_the_same_way(folders):
    """The second process alone has so many batches that their blocks' inputs do not fit: both make several passes."""
    for rank in (0, 1):
        uneven = torch.load(folders[0] / f"uneven-{rank}.pt")
        assert "it would take" in uneven["log"]
        tiny.assert_same(uneven["default"], uneven["one pass"])


@pytest.mark.slow
def test_passes_do_not_matter(folders):
    starts = [torch.load(folders[0] / f"{case}-0.pt")["start"] for case in ("default", "one pass", "three passes")]
    for other in starts[1:]:
        tiny.assert_same(starts[0], other)


@pytest.mark.slow
def test_an_error_is_raised_in_both_processes(folders):
    """By a message, not by a time-out: also where one process only has an SVD to make, or data."""
    first, second = (torch.load(folders[0] / f"messages-{rank}.pt") for rank in (0, 1))
    assert second.pop("forward on one").startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert first.pop("forward on one").startswith("ValueError: On process 1: mat1 and mat2 shapes cannot be mul")
    for messages in (first, second):
        # A process raises its own error, and otherwise says whose it is.
        text = {case: message and re.sub("On process [01]: ", "", message) for case, message in messages.items()}
        assert text["unused"].startswith("ValueError: No gradient reached base_model.model.unused")
        assert text["nan on one"].startswith("ValueError: The gradient of base_model.model.")
        assert text["no data"].startswith("ValueError: No gradient reached")
        assert text["no data on one"] is None
        assert text["float64"] is None
