"""The scores of a run in the Hub's newer form, beside the `model-index` of the card: `.eval_results/*.yaml`."""

import math
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import yaml_dump

from ..report.numbers import alike
from ..report.record import RunRecord


FILE = ".eval_results/hf_reflora.yaml"


def write_eval_results(folder: Path, record: RunRecord) -> None:
    """Writes the scores with the adapter into `folder`, one entry each, if they are of a dataset on the Hub.

    Nothing is written where huggingface_hub is too old to know the form, and no score that is not finite.
    """
    entry = getattr(huggingface_hub, "EvalResultEntry", None)
    names = [name for name in record.compared_scores if math.isfinite(record.after[name])]
    if entry is None or record.dataset_id is None or not names:
        return
    results = []
    for name in names:
        notes = [f"base model: {alike([record.before[name]])[0]}"]
        notes += [f"{record.evaluation_rows} rows"] if record.evaluation_rows else []
        notes += [f"split {record.evaluation_split}"] if record.evaluation_split else []
        results.append(
            entry(
                dataset_id=record.dataset_id,
                task_id=name,
                value=round(record.after[name], 6),
                dataset_revision=record.dataset_revision,
                notes=", ".join(notes),
            )
        )
    path = folder / FILE
    path.parent.mkdir(exist_ok=True)
    text = yaml_dump(huggingface_hub.eval_result_entries_to_yaml(results), sort_keys=False)
    path.write_text(text, encoding="utf-8", newline="\n")
