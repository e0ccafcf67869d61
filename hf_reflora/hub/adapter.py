"""An adapter's folder as it goes to the Hub: which files, in which form, with which card; and the push of it."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights

from ..lora_sb.config import LoraSbConfig
from ..lora_sb.export import export_lora
from ..report.card import render
from ..report.diagnostics import diagnostics, method_of
from ..report.edits import is_edited
from ..report.front_matter import LICENSES, check_front_matter, own_entries
from ..report.ids import hub_id, is_hub_id
from ..report.plot import plot
from ..report.record import RECORD_NAME, RunRecord
from .repository import Repo, prepare
from .scan import check_files
from .upload import license_of, read_text, upload


CARD_NAME, PLOT_NAME, NATIVE_FOLDER = "README.md", "training.png", "native"
# What an adapter's repository is made of; all else stays here: training_args.bin, optimizer states, logs, .env, …
SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".md", ".png", ".svg", ".jpg", ".yaml", ".yml"}
NEVER = ("training_args.bin", ".*", "__pycache__")
STATE = {"trainer_state.json", "training_args.json", "all_results.json", "train_results.json", "eval_results.json"}


@dataclass(frozen=True)
class Push:
    """What a push did: the commit (the newest one, if nothing had changed) and the files of the adapter."""

    commit: CommitInfo
    repo_id: str
    files: list[str]
    left_out: list[str]
    kept_card: bool


def push_adapter(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    other_base: bool = False,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
    message: str = "Upload adapter with hf_reflora",
) -> Push:
    """Pushes a saved adapter to the Hub in one commit: weights, tokenizer, card, run record and plot.

    A LoRA-SB adapter goes as the ordinary LoRA it is equal to, which everybody can load, with its own form in
    `native/`. `folder` itself is not changed. A second call pushes only what is different, and nothing if all is
    there. A card that somebody edited, in the folder or else on the Hub, is kept.

    Args:
        folder: Folder of the adapter, such as a trainer's `output_dir` or a checkpoint.
        repo_id, token, private, revision, create_pr, other_base: See `hf_reflora.hub.repository.prepare`.
        base_model: Id of the base model on the Hub, where the files name a local path. Default: what the files say.
        license, language, tags: For the card. Default: what the present card says; the license of the base model.
        message: Message of the commit, and title of the pull request.

    Raises:
        PushError: with the reason, if it could not be pushed.
        ValueError: no adapter in the folder, a wrong card, or a secret in a file (`scan.SecretFound`).
    """
    folder = Path(folder)
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(f"base_model must be an id on the Hub such as org/model, got {base_model!r}.")
    record = _record(folder, base_model)
    repo = prepare(
        repo_id,
        token=token,
        private=private,
        revision=revision,
        create_pr=create_pr,
        base_model=record.base_model,
        other_base=other_base,
    )
    return push_prepared(folder, repo, record=record, license=license, language=language, tags=tags, message=message)


def push_prepared(
    folder: Path,
    repo: Repo,
    *,
    record: RunRecord | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
    checkpoints: dict[str, Path] | None = None,
    message: str = "Upload adapter with hf_reflora",
) -> Push:
    """`push_adapter` to a repository that `prepare` has checked, with `checkpoints`, folders by their name there."""
    record = _record(folder, None) if record is None else record
    earlier = read_text(repo, CARD_NAME)
    with tempfile.TemporaryDirectory(prefix="hf_reflora-") as temporary:
        staged = Path(temporary) / "adapter"
        left_out = stage(folder, staged, record=record, checkpoints=checkpoints or {})
        own = _read(folder / CARD_NAME)
        kept_card = earlier is not None and is_edited(earlier) and not is_edited(own)
        if is_edited(own):
            check_front_matter(own)
        elif not kept_card:
            here, there = own_entries(own), own_entries(earlier or "")
            license = license or here.license or there.license
            if license is None and record.base_model:
                inherited = license_of(repo, record.base_model)
                license = inherited if inherited in LICENSES else None
            text = render(
                record,
                repo_id=repo.id,
                plot=PLOT_NAME if (staged / PLOT_NAME).exists() else None,
                exported=(staged / NATIVE_FOLDER).exists(),
                native_folder=NATIVE_FOLDER if (staged / NATIVE_FOLDER).exists() else None,
                license=license,
                language=language or here.language or there.language,
                tags=[*here.tags, *there.tags, *tags],
            )
            (staged / CARD_NAME).write_text(text, encoding="utf-8", newline="\n")
        files = sorted(path for path in staged.rglob("*") if path.is_file())
        check_files(staged, files, [str(repo.api.token or "")])
        commit = upload(repo, staged, message)
        return Push(commit, repo.id, [f.relative_to(staged).as_posix() for f in files], left_out, kept_card)


def stage(folder: Path, target: Path, *, record: RunRecord, checkpoints: dict[str, Path]) -> list[str]:
    """Puts what is published of `folder` and `checkpoints` into the new folder `target`; returns what is not.

    Files are linked where that is possible. A LoRA-SB adapter is exported, its own form goes to `native/`; a base
    model's local path in `adapter_config.json` becomes the id in the record, or null.

    Raises:
        ValueError: `folder` has no adapter, one that cannot be exported, or one that the record does not describe.
    """
    config = _config(folder)
    _check_record(record, folder, config)
    target.mkdir(parents=True)
    for name, checkpoint in checkpoints.items():
        shutil.copytree(
            checkpoint, target / name, copy_function=link, ignore=shutil.ignore_patterns(*NEVER, CARD_NAME)
        )
    taken = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_published(path)]
    taken += [
        path
        for inner in sorted(folder.iterdir())
        if inner.is_dir() and not inner.name.startswith((".", "_", "checkpoint-")) and (inner / CONFIG_NAME).is_file()
        for path in sorted(inner.iterdir())
        if path.is_file() and _is_published(path)
    ]
    for path in taken:
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        link(path, copy)
    if isinstance(config, LoraSbConfig):
        native = target / NATIVE_FOLDER
        native.mkdir()
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            (target / name).replace(native / name)
        exported = target.with_name("exported")
        export_lora(folder, exported)
        for path in exported.iterdir():
            path.replace(target / path.name)
    for path in target.rglob(CONFIG_NAME):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("base_model_name_or_path") != record.base_model:
            path.unlink()  # perhaps a link to the original
            settings["base_model_name_or_path"] = record.base_model
            path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8", newline="\n")
    if not (target / PLOT_NAME).exists():
        plot(record, target / PLOT_NAME)
    if not is_edited(_read(folder / CARD_NAME)):
        (target / CARD_NAME).unlink(missing_ok=True)  # it is rendered anew
    return sorted(
        path.name for path in folder.iterdir() if path.name != CARD_NAME and not (target / path.name).exists()
    )


def _record(folder: Path, base_model: str | None) -> RunRecord:
    """The folder's run record; without one, what the adapter's configuration tells."""
    config = _config(folder)
    named = config.base_model_name_or_path or "an unknown base model"
    if (folder / RECORD_NAME).is_file():
        record = RunRecord.load(folder / RECORD_NAME)
    else:
        record = RunRecord(method=method_of(config), model=named, base_model=hub_id(named))
    if base_model is not None:
        record.replace(base_model=base_model)
    return record


def _check_record(record: RunRecord, folder: Path, config: PeftConfig) -> None:
    """The record of a run may lie beside the weights of another one, whose folder it was."""
    said = record.diagnostics
    found = diagnostics(config, load_peft_weights(str(folder), device="cpu")) if said else {}
    differ = [name for name in said if name.startswith(("norm", "layers")) and not _close(said[name], found.get(name))]
    if differ:
        raise ValueError(
            f"{folder / RECORD_NAME} describes other weights than {SAFETENSORS_WEIGHTS_NAME} beside it: "
            + ", ".join(f"{name} is {_number(found.get(name))}, not {_number(said[name])}" for name in differ)
            + ". Save the adapter of that run here (trainer.save_model), or remove the record."
        )


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"


def _close(said: float, found: float | None) -> bool:
    return found is not None and math.isclose(said, found, rel_tol=1e-3, abs_tol=1e-6)


def _config(folder: Path) -> PeftConfig:
    if not (folder / CONFIG_NAME).is_file() or not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise ValueError(
            f"{folder} has no adapter: {CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME} were looked for, found: "
            f"{there or 'nothing'}. Give a trainer's output folder, a checkpoint, or what save_pretrained wrote."
        )
    return PeftConfig.from_pretrained(str(folder))


def _is_published(path: Path) -> bool:
    hidden = path.name.startswith((".", "_"))
    return path.suffix in SUFFIXES and path.name not in STATE and not hidden


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """A hard link, so that rotation of checkpoints does not take the file away during the upload; or a copy."""
    source = os.path.realpath(source)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
