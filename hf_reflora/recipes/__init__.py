"""The recipes: trainings that run from the command line or a YAML file (`sft`, `dpo`, `classify`)."""

import os
from importlib.util import find_spec

from ..requirements import extra


# On a busy machine OpenMP's threads shall sleep while they wait: they would spin, which there makes everything many
# times slower. On an idle machine spinning is right: to sleep almost doubles the time of a step. OpenMP reads the
# variable once, when torch is loaded, which is after this package; processes that a launcher starts inherit it.
if hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Looked for, not imported: that takes seconds, and a recipe's launcher does not need them.
with extra("demo", "A recipe"):
    for module in ("datasets", "gguf", "rich", "trl"):
        if find_spec(module) is None:
            raise ModuleNotFoundError(name=module)
