"""The scores of a run in the Hub's newer form, beside the `model-index` of the card: `.eval_results/*.yaml`."""

import math
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.utils import yaml_dump

from ..report.benchmarks import LM_EVAL, benchmark_rows
from ..report.numbers import alike, as_number
from ..report.record import RunRecord


FILE = ".eval_results/hf_reflora.yaml"


def write_eval_results(folder: Path, record: RunRecord) -> None:
    """Writes the scores with the adapter into `folder`, one entry each, if they are of a dataset on the Hub.

    Nothing is written where huggingface_hub is too old to know the form, and no score that is not finite.
    """
    entry = getattr(huggingface_hub, "EvalResultEntry", None)
    scores = [*_scores(record), *_benchmarks(record)]
    if entry is None or not scores:
        return
    path = folder / FILE
    path.parent.mkdir(exist_ok=True)
    results = [entry(**score) for score in scores]
    text = yaml_dump(huggingface_hub.eval_result_entries_to_yaml(results), sort_keys=False)
    path.write_text(text, encoding="utf-8", newline="\n")


def _scores(record: RunRecord) -> list[dict[str, Any]]:
    """The scores on held-out rows of the training's dataset."""
    scores = []
    for name in record.compared_scores:
        if record.dataset_id is None or not math.isfinite(record.after[name]):
            continue
        notes = [f"base model: {alike([record.before[name]])[0]}"]
        notes += [f"{record.evaluation_rows} rows"] if record.evaluation_rows else []
        notes += [f"split {record.evaluation_split}"] if record.evaluation_split else []
        scores.append(
            {
                "dataset_id": record.dataset_id,
                "task_id": name,
                "value": round(record.after[name], 6),
                "dataset_revision": record.dataset_revision,
                "notes": ", ".join(notes),
            }
        )
    return scores


def _benchmarks(record: RunRecord) -> list[dict[str, Any]]:
    """The benchmarks whose data are on the Hub: of each task the first metric, because the form has one value each."""
    scores: dict[tuple[str, str], dict[str, Any]] = {}
    for benchmark in record.benchmarks:
        value, dataset, task = as_number(benchmark.get("after")), benchmark.get("dataset"), benchmark["task"]
        if not dataset or value is None or not math.isfinite(value) or (dataset, task) in scores:
            continue
        notes = [
            f"{row['metric']}: {row['after']}, base model: {row['before']}, {row['rows']} rows, {row['fewshot']}-shot"
            for row in benchmark_rows([benchmark])
        ]
        scores[dataset, task] = {
            "dataset_id": dataset,
            "task_id": task,
            "value": round(value, 6),
            "source_url": LM_EVAL,
            "source_name": f"lm-eval {benchmark.get('lm_eval')}",
            "notes": ", ".join(notes),
        }
    return list(scores.values())
