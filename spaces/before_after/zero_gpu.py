"""ZeroGPU, whose package replaces parts of torch: import this before anything that imports torch.

Elsewhere the package is absent, or its decorator does nothing.
"""

from collections.abc import Callable
from typing import Any


try:
    from spaces import GPU
except ImportError:
    GPU = None

LONGEST_CALL = 120  # seconds; ZeroGPU refuses calls of several minutes


def seconds(prompt: str, adapter: str, settings: Any, system: str) -> int:
    """Seconds of a GPU to ask for. ZeroGPU calls this with the arguments of the function that `on_gpu` decorates."""
    return min(15 + settings.max_new_tokens // 8, LONGEST_CALL)


def on_gpu(function: Callable) -> Callable:
    """Decorates what needs a GPU. On ZeroGPU it runs in another process; arguments and results must be picklable."""
    return function if GPU is None else GPU(duration=seconds)(function)
