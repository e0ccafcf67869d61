"""The recipes: trainings that run from the command line or a YAML file (`sft`, `dpo`, `classify`)."""

from importlib.util import find_spec

from ..requirements import extra


# Looked for, not imported: that takes seconds, and a recipe's launcher does not need them.
with extra("demo", "A recipe"):
    for module in ("datasets", "gguf", "rich", "trl"):
        if find_spec(module) is None:
            raise ModuleNotFoundError(name=module)
