"""What describes a run may fail, the run itself must not: errors that are logged where they would end a training."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


logger = logging.get_logger(__name__)


@contextmanager
def log_errors(failure: str) -> Iterator[None]:
    """Within it an exception is logged with its traceback and goes no further.

    For run record, plot and card while a Trainer trains and saves: hours of training must not be lost to a file that
    only describes them. On several processes use it around work that one process does alone, or that fails on all of
    them alike: a process that leaves a collective call early lets the others wait.

    Args:
        failure: What the log says, such as "The model card could not be written".
    """
    try:
        yield
    except Exception:
        logger.exception(f"{failure}. Training goes on, and the weights are saved all the same.")
