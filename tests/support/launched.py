"""Runs the recipe as its first argument, on a CPU where accelerate and DeepSpeed have other ways than on a GPU.

accelerate shards (FSDP2) only where processes have an accelerator each, which it tells by the name MULTI_GPU; and
DeepSpeed compiles for minutes what gloo does as well. Nothing else is changed.
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType


start = PartialState.__init__


def start_as_if_on_gpus(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    script, kind, *sys.argv[1:] = sys.argv[1:]
    sys.argv[0] = script
    if kind == "fsdp2":
        PartialState.__init__ = start_as_if_on_gpus
    elif kind.startswith("zero"):
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
