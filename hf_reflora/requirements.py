"""What is to be installed: errors for libraries that are missing or too old, and where this one comes from."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from packaging.version import Version


# What `pip install` is to be given by somebody who does not have hf_reflora. To be "hf_reflora" once it is on PyPI.
PIP_REQUIREMENT = "git+https://github.com/hf-reflora/hf_reflora"


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Around imports of optional libraries: names the extra of hf_reflora that installs them.

    Args:
        name: The extra, such as "trl".
        what: What needs it, as the beginning of a sentence.

    Raises:
        ImportError: A library is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f'{what} needs {error.name}, which is not installed: pip install "hf_reflora[{name}]"', name=error.name
        ) from error


def require(package: str, least: str, what: str, instead: str) -> None:
    """Raises an ImportError if `package` is older than version `least`.

    Args:
        what: What needs that version, and why, as the beginning of a sentence that ends with the version.
        instead: What an older version can be used for, as a sentence.
    """
    installed = version(package)
    if Version(installed).release < Version(least).release:
        raise ImportError(
            f"{what} {package} {least} or newer, but {package} {installed} is installed: "
            f'pip install "{package}>={least}". {instead}'
        )
