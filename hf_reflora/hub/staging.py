"""The folder of an adapter as it goes to the Hub: which files, in which form, and whether its record describes it."""

import json
import math
import os
import shutil
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..adapter_files import published_names
from ..lora_sb.config import LoraSbConfig
from ..lora_sb.export import export_lora
from ..report.adapter_config import read_adapter_config
from ..report.diagnostics import diagnostics, method_of
from ..report.edits import is_edited
from ..report.ids import hub_id
from ..report.local_paths import shortened, without_local_paths
from ..report.plot import plot
from ..report.record import RECORD_NAME, RunRecord
from ..report.recorder import peft_settings
from ..report.weights import check_weights, convert_weights, read_weights


CARD_NAME, PLOT_NAME, NATIVE_FOLDER = "README.md", "training.png", "native"
# How the names of the last layers of transformers' classifiers end, which have a row for each class.
CLASSIFIERS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")
# What is left out of checkpoints: a pickle that may contain a token, .env, …
NEVER = ("training_args.bin", ".*", "__pycache__")
# The settings in configurations that are paths on the machine that wrote them.
PATH_WORDS = ("path", "file", "dir")


def read_record(folder: Path, base_model: str | None = None) -> RunRecord:
    """The run record of a saved adapter; without the file, what the adapter's configuration tells.

    Args:
        folder: Folder of the adapter.
        base_model: Id of the base model on the Hub, which replaces the record's.

    Raises:
        ValueError: the folder has no adapter, or the record describes other weights, because it was left by another
            run.
    """
    config = read_config(folder)
    if (folder / RECORD_NAME).is_file():
        record = RunRecord.load(folder / RECORD_NAME)
        _check_weights(record, folder, config)
    else:
        record = _record_of_files(folder, config)
    mapping = config.auto_mapping
    if mapping and not {"task_type", "auto_mapping"} & set(record.peft):  # only the saved configuration has it
        record.update(peft={"auto_mapping": mapping})
    if base_model is not None:
        record.replace(base_model=base_model)
    return record


def _record_of_files(folder: Path, config: PeftConfig) -> RunRecord:
    """What the configuration and the weights tell of an adapter without a run record."""
    name = config.base_model_name_or_path or "an unknown base model"
    if (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        check_weights(folder)
    tensors = read_weights(folder)
    numbers = diagnostics(config, tensors) if isinstance(config, LoraConfig | LoraSbConfig) else {}
    heads = [tensor for name, tensor in tensors.items() if name.endswith(CLASSIFIERS) and tensor.ndim == 2]
    return RunRecord(
        method=method_of(config),
        model=shortened(name),
        base_model=hub_id(name),
        peft=peft_settings(config),
        diagnostics=numbers,
        trainable_parameters=numbers.pop("trained_numbers", None),
        num_labels=len(heads[0]) if heads else None,
    )


def read_config(folder: Path) -> PeftConfig:
    """The configuration of a saved adapter.

    Raises:
        ValueError: the folder has no adapter.
    """
    weights = [name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / name).is_file()]
    if not (folder / CONFIG_NAME).is_file() or not weights:
        there = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise ValueError(
            f"{folder} has no adapter: {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME} were looked for, found: "
            f"{there or 'nothing'}. Give a trainer's output folder, a checkpoint, or what save_pretrained wrote."
        )
    return read_adapter_config(folder)


def stage(folder: Path, target: Path, *, record: RunRecord, checkpoints: dict[str, Path]) -> list[str]:
    """Puts into the new folder `target` what is published of `folder` and `checkpoints`, without changing these.

    A LoRA-SB adapter is exported, and its own form goes to `native/`; weights in the older form, `.bin`, become
    safetensors. A base model's local path in `adapter_config.json` becomes the id in the record, or null, and other
    local paths in configurations their last name. A plot is drawn where there is none. A card that nobody has edited
    is left out, because it has to be rendered for the Hub.

    Args:
        folder: Folder of the adapter.
        target: Folder to make. Files are hard links where that is possible.
        record: The adapter's record.
        checkpoints: Folders of checkpoints by their names in `target`.

    Returns:
        The names in `folder` that are not published.

    Raises:
        ValueError: `folder` has no adapter, one that cannot be exported or loaded, or broken weights, see
            `check_weights`.
    """
    config = read_config(folder)
    _check_start(folder, config)
    target.mkdir(parents=True)
    for name, checkpoint in checkpoints.items():
        ignore = shutil.ignore_patterns(*NEVER, CARD_NAME)
        shutil.copytree(checkpoint, target / name, copy_function=link, ignore=ignore)
    for name in published_names(folder):
        copy = target / name
        copy.parent.mkdir(exist_ok=True, parents=True)
        link(folder / name, copy)
    for path in (*target.glob(WEIGHTS_NAME), *target.glob(f"*/{WEIGHTS_NAME}")):
        if path.with_name(SAFETENSORS_WEIGHTS_NAME).exists():
            path.unlink()
        else:
            convert_weights(path.parent)
    for path in (*target.glob(SAFETENSORS_WEIGHTS_NAME), *target.glob(f"*/{SAFETENSORS_WEIGHTS_NAME}")):
        check_weights(path.parent)
    if isinstance(config, LoraSbConfig):
        _export(folder, target)
    _clean_configs(target, record.base_model)
    if not (target / PLOT_NAME).exists():
        plot(record, target / PLOT_NAME)
    if not is_edited(read_card(folder)):
        (target / CARD_NAME).unlink(missing_ok=True)
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name != CARD_NAME and not (target / name).exists())


def _check_start(folder: Path, config: PeftConfig) -> None:
    init = getattr(config, "init_lora_weights", True)
    # PEFT raises where it loads a CorDA, and loads a LoRA-GA in silence onto a base model that still has the start.
    if init in ("corda", "lora_ga"):
        raise ValueError(
            f"{folder} has init_lora_weights={init!r}: its start was taken out of the base model's weights, which "
            "cannot be repeated without the training data. Save it with path_initial_model_for_weight_conversion, as "
            f"PEFT's save_pretrained says, or train it by a recipe with init {init}, which saves an ordinary LoRA."
        )


def read_card(folder: Path) -> str:
    """The text of the folder's card, "" if it has none."""
    path = folder / CARD_NAME
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8, which the Hub shows: {error}. Save it as UTF-8.") from error


def link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Makes `target` a hard link to the file `source`, or a copy where links are not possible.

    A link costs no space, and it stays when training deletes the original during the upload.
    """
    source = os.path.realpath(source)  # in the Hub's cache the files are symbolic links to blobs
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _export(folder: Path, target: Path) -> None:
    """Replaces a LoRA-SB adapter in `target` by the ordinary LoRA that it is equal to, and moves it to `native/`."""
    native, exported = target / NATIVE_FOLDER, target.with_name("exported")
    native.mkdir()
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        (target / name).replace(native / name)
    export_lora(folder, exported)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        (exported / name).replace(target / name)


def _clean_configs(target: Path, base_model: str | None) -> None:
    """Names the base model in all adapters' configurations by its id, and shortens other local paths."""
    for path in target.rglob("*.json"):
        if path.name == CONFIG_NAME:
            settings = json.loads(path.read_text(encoding="utf-8"))
            clean = without_local_paths({**settings, "base_model_name_or_path": base_model})
            if "base_model_name_or_path" not in settings and base_model is None:
                del clean["base_model_name_or_path"]
        elif path.name.endswith("_config.json"):  # of the tokenizer or the processor; their texts are no paths
            settings = json.loads(path.read_text(encoding="utf-8"))
            clean = {
                name: without_local_paths(value) if any(word in name for word in PATH_WORDS) else value
                for name, value in settings.items()
            }
        else:
            continue
        if clean != settings:
            path.unlink()  # it may be a hard link, and writing to it would change the original
            path.write_text(json.dumps(clean, indent=2, sort_keys=True), encoding="utf-8", newline="\n")


def _check_weights(record: RunRecord, folder: Path, config: PeftConfig) -> None:
    """Raises if the diagnostics in the record are not those of the weights beside it."""
    recorded = record.diagnostics
    actual = diagnostics(config, read_weights(folder)) if recorded else {}
    # Older records do not count embeddings among the layers, so that norms decide where there are some.
    names = [name for name in recorded if name.startswith("norm")] or [name for name in recorded if name == "layers"]
    differ = [name for name in names if not _close(recorded[name], actual.get(name))]
    if differ:
        raise ValueError(
            f"{folder / RECORD_NAME} describes other weights than {SAFETENSORS_WEIGHTS_NAME} beside it: "
            + ", ".join(f"{name} is {_number(actual.get(name))}, not {_number(recorded[name])}" for name in differ)
            + ". Save the adapter of that run here (trainer.save_model), or remove the record."
        )


def _close(recorded: float, actual: float | None) -> bool:
    # Loose, because the weights in the file may have fewer bits than those that were diagnosed.
    return actual is not None and math.isclose(recorded, actual, rel_tol=1e-3, abs_tol=1e-6)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"
