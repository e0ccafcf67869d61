"""The files that come with the recipes, found by name: YAML files, accelerate's configurations, the demo's data.

Their only copy in the repository is the folder recipes/. pyproject.toml maps it into the wheel as
hf_reflora/recipes/files, so that the names work without a clone, too. Nothing here imports more than the standard
library: `hf-reflora` uses it before it starts a training.
"""

from pathlib import Path


INSTALLED = Path(__file__).parent / "files"
IS_INSTALLED = INSTALLED.is_dir()
FOLDER = INSTALLED if IS_INSTALLED else Path(__file__).parents[2] / "recipes"
ACCELERATE = "accelerate"


def config_names() -> list[str]:
    """The recipes' YAML files as `--config` takes them, such as "smollm2-135m/reflora"."""
    files = (path.relative_to(FOLDER).with_suffix("") for path in FOLDER.glob("*/*.yaml"))
    return sorted(file.as_posix() for file in files if file.parent.name != ACCELERATE)


def accelerate_names() -> list[str]:
    """The configurations of accelerate as `--accelerate_config` takes them, such as "fsdp2"."""
    return sorted(path.stem for path in (FOLDER / ACCELERATE).glob("*.yaml"))


def config_file(name: str) -> Path:
    """The YAML file of a recipe: `name` itself if it is a file, otherwise the shipped one of that name.

    Raises:
        ValueError: if there is neither; the message lists the shipped names.
    """
    return _file(name, FOLDER, config_names(), "--config")


def accelerate_file(name: str) -> Path:
    """A configuration of `accelerate launch`: `name` itself if it is a file, otherwise the shipped one of that name.

    Raises:
        ValueError: if there is neither; the message lists the shipped names.
    """
    return _file(name, FOLDER / ACCELERATE, accelerate_names(), "--accelerate_config")


def dataset(name: str) -> str:
    """What `datasets.load_dataset` is to be given for a dataset's name.

    The demo's YAML files name their data as it lies in a clone, `recipes/data/tool_calls`. Where that folder does not
    exist, the shipped one of the same path is meant. Any other name is returned as it is.
    """
    parts = Path(name).parts
    if parts[:2] != ("recipes", "data") or len(parts) < 3 or Path(name).exists():
        return name
    folder = FOLDER.joinpath(*parts[1:])
    return str(folder) if folder.is_dir() and ".." not in parts else name


def _file(name: str, folder: Path, names: list[str], option: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name in names:
        return folder / f"{name}.yaml"
    raise ValueError(
        f"{option} {name}: there is no such file in {Path.cwd()}, and no shipped one of that name. "
        f"Shipped are: {', '.join(names)}."
    )
