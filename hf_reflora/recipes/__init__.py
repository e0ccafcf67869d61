"""The recipes: trainings that run from the command line or a YAML file (`sft`, `dpo`, `classify`)."""

import os
from importlib.util import find_spec

from ..requirements import extra


# OpenMP's threads otherwise spin while they wait, which on a busy machine makes everything many times slower. OpenMP
# reads the variable once, when torch is loaded, and that is after this package; the processes that a launcher starts
# inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Looked for, not imported: that takes seconds, and a recipe's launcher does not need them.
with extra("demo", "A recipe"):
    for module in ("datasets", "gguf", "rich", "trl"):
        if find_spec(module) is None:
            raise ModuleNotFoundError(name=module)
