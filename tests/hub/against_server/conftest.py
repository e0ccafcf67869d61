"""A local Hub, set up before huggingface_hub is imported; each test finds it empty."""

import os
import tempfile

import pytest
from local_hub import XET, LocalHub


HUB = LocalHub().start()
_home = tempfile.TemporaryDirectory(prefix="hf_home", ignore_cleanup_errors=True)
os.environ.update(HUB.environment(_home.name, xet=XET))


@pytest.fixture
def server():
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
