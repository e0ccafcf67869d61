"""Marks for tests of what the oldest supported libraries do not have."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def needs(package: str, least: str, feature: str):
    """Skips a test where `package` is older than `least`, the first version that has `feature`."""
    installed = version(package)
    reason = f"{feature} came with {package} {least}; {installed} is installed"
    return pytest.mark.skipif(Version(installed) < Version(least), reason=reason)
