"""A local Hub, set up before huggingface_hub is imported; each test finds it empty."""

import os
import tempfile

import pytest
from local_hub import LocalHub


HUB = LocalHub().start()
_home = tempfile.TemporaryDirectory(prefix="hf_home", ignore_cleanup_errors=True)
os.environ.update(HUB.environment(_home.name))


@pytest.fixture
def upload_path(request, monkeypatch):
    """How large files are uploaded: "xet", or "lfs" where a test asks for it or HUB_TESTS=lfs for all."""
    from huggingface_hub import constants

    default = "lfs" if os.environ["HUB_TESTS"] == "lfs" else "xet"
    path = getattr(request, "param", default)
    if (path, default) == ("xet", "lfs"):
        pytest.skip("HUB_TESTS=lfs: nothing is uploaded by Xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", path == "lfs")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", str(int(path == "lfs")))  # of the processes that a test starts
    return path


@pytest.fixture
def server(upload_path):
    HUB.reset()
    return HUB


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Attempts without long pauses."""
    from hf_reflora.hub import retry

    monkeypatch.setattr(retry, "DELAYS", (0.01, 0.02, 0.04, 0.08, 0.16))
    monkeypatch.setattr(retry, "LONGEST_DELAY", 0.2)


def pytest_unconfigure():
    HUB.stop()
