"""What the arguments of `create_model_card` say about a run, those of transformers' Trainer and those of TRL's."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from ..report.ids import hub_id
from ..report.licenses import check_license


Names: TypeAlias = str | Sequence[str] | None


def record_entries(
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: Names = None,
    *,
    license: str | None = None,
    language: Names = None,
    finetuned_from: str | None = None,
    tasks: Names = None,
    dataset: Names = None,
    dataset_tags: Names = None,
    dataset_args: Names = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The facts of a run record that the arguments state, and the entries of its field `card`.

    What is not given, or empty, is in neither. The arguments are explained at `AdapterTrainerMixin.create_model_card`.

    Raises:
        ValueError: for a license that is neither an id nor a list of ids.
    """
    check_license(license)
    ids = [name for name in map(hub_id, listed(dataset_tags)) if name is not None]
    facts: dict[str, Any] = {}
    if dataset_name:
        facts |= {"dataset": dataset_name, "dataset_id": hub_id(dataset_name)}
    if dataset_tags:
        facts |= {"dataset": ", ".join(listed(dataset_tags)), "dataset_id": ids[0] if ids else None}
    if dataset:
        facts["dataset"] = ", ".join(listed(dataset))
    if dataset_args:
        facts["dataset_config"] = ", ".join(listed(dataset_args))
    if finetuned_from:
        facts |= {"model": finetuned_from, "base_model": hub_id(finetuned_from)}
    card = {"title": model_name, "license": license, "language": language, "tags": listed(tags)}
    card |= {"task": next(iter(listed(tasks)), None), "datasets": ids}
    return facts, {name: value for name, value in card.items() if value}


def listed(names: Names) -> list[str]:
    """One name or several as a list."""
    return [names] if isinstance(names, str) else list(names or [])
