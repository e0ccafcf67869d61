"""`hf-reflora sft …` starts a recipe by `accelerate launch`, as `trl sft …` does with TRL's scripts."""

import importlib
import subprocess
import sys
from argparse import ArgumentParser

from .shipped import accelerate_file, accelerate_names, config_file, config_names


# Options that both the launcher and the recipes have. The recipes get them, as from any `accelerate launch script …`.
TRAINERS_OWN = ("-h", "--help", "--debug", "--gradient_accumulation_steps", "--gradient-accumulation-steps")


def launch(recipe: str, arguments: list[str]) -> None:
    """Runs the recipe `recipe`, "sft", "dpo" or "classify", in as many processes as the launcher's options say.

    Args:
        recipe: Name of a module beside this one.
        arguments: The recipe's options and, anywhere among them, those of `accelerate launch`. Two options also take
            the names of shipped files: `--config` (a recipe's YAML file) and `--accelerate_config` (accelerate's).

    Raises:
        SystemExit: with the exit status of the training, if it failed.
        ValueError: if a file or name does not exist.
    """
    if "-h" in arguments or "--help" in arguments:
        print_help(recipe)
        return
    if name := _value(arguments, "--config"):
        config_file(name)  # raises before anything large is imported
    from accelerate.commands.launch import launch_command, launch_command_parser

    launcher = launch_command_parser()
    own, recipes_own = split(_with_config_file(arguments), launcher)
    try:
        launch_command(launcher.parse_args([*own, "--module", f"{__package__}.{recipe}", *recipes_own]))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the process itself has shown why


def print_help(recipe: str) -> None:
    """The options of a recipe, and how those of the launcher are given."""
    module = importlib.import_module(f".{recipe}", __package__)
    module.make_parser(prog=f"hf-reflora {recipe}").print_help()
    print(
        "\nlauncher:\n"
        "  Options of accelerate launch may stand among these, such as --num_processes 2 or --mixed_precision bf16.\n"
        f"  --accelerate_config takes a file or one of {', '.join(accelerate_names())}.\n"
        f"  --config takes a file or one of {', '.join(config_names())}."
    )


def split(arguments: list[str], launcher: ArgumentParser) -> tuple[list[str], list[str]]:
    """The options that `launcher` knows, with their values, and all others in their order."""
    actions = {name: action for action in launcher._actions for name in action.option_strings}
    own, others = [], []
    rest = list(arguments)
    while rest:
        name, equals, _ = rest[0].partition("=")
        if name in actions and name not in TRAINERS_OWN:
            # A flag has nargs 0; every other option of the launcher takes one value.
            count = 1 if equals or actions[name].nargs == 0 else 2
            own += rest[:count]
        else:
            count = 1
            others.append(rest[0])
        rest = rest[count:]
    return own, others


def _value(arguments: list[str], option: str) -> str | None:
    """The value that follows `option`, None if it is not given."""
    if option not in arguments:
        return None
    if arguments[-1] == option:
        raise ValueError(f"{option} is given without a value.")
    return arguments[arguments.index(option) + 1]


def _with_config_file(arguments: list[str]) -> list[str]:
    """`arguments` with accelerate's own option, `--config_file FILE`, in place of `--accelerate_config NAME`."""
    name = _value(arguments, "--accelerate_config")
    if name is None:
        return arguments
    i = arguments.index("--accelerate_config")
    return ["--config_file", str(accelerate_file(name)), *arguments[:i], *arguments[i + 2 :]]
