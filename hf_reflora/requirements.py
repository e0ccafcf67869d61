"""Errors for libraries that are missing or too old, which say how to mend it."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from packaging.version import Version


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
