"""Runs a recipe for every combination of some options, and says which setting of each method is best.

`plan` reads what is to be run, `checks` tries all options with the recipe's parser, `runner` runs them, each in a
`process` of its own, `outcomes` keeps one JSON line a run, `summary` compares the methods in a table and `curves` in
plots. `command` is the command `hf-reflora sweep`.
"""

from importlib.util import find_spec

from ..requirements import extra


with extra("sweep", "A sweep"):
    for module in ("filelock", "matplotlib", "optuna"):
        if find_spec(module) is None:
            raise ModuleNotFoundError(name=module)
