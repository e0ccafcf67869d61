"""Benchmarks by lm-eval before and after training: how a record holds them, and how the card shows them.

`RunRecord.benchmarks` has a dictionary for each task and metric:

- `task`, `version`: the task's name in lm-eval, and the version of its definition
- `metric`, `filter`: such as "exact_match" and "strict-match"; the filter is "none" where the task has none
- `higher_is_better`: None where lm-eval does not say
- `before`, `after`: the score of the base model and of the adapter; `before_stderr`, `after_stderr`: their standard
  errors, None where lm-eval computes none
- `rows`: how many rows the scores are of (lm-eval's effective samples); `total_rows`: how many the task has
- `fewshot`: solved examples in the prompt; `seed`: by which they are drawn
- `dataset`, `dataset_config`: the task's data on the Hub, None where they are elsewhere
- `lm_eval`: the version of lm-eval
"""

import math
from typing import Any

from huggingface_hub import EvalResult

from .numbers import alike, as_number, change, counted
from .record import RunRecord


LM_EVAL = "https://github.com/EleutherAI/lm-evaluation-harness"


def benchmark_rows(entries: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows of a table of the entries, as text: scores with standard errors, "200 of 1,319" rows."""
    rows = []
    for entry in entries:
        numbers = [as_number(entry.get(name)) for name in ("before", "after", "before_stderr", "after_stderr")]
        before, after, *errors = numbers
        if before is None or after is None:
            continue
        difference = change(before, after)
        texts = alike([number for number in (before, after, *errors, difference) if number is not None])
        shown = dict(zip((number for number in (*numbers, difference) if number is not None), texts, strict=True))
        total = entry.get("total_rows")
        part = f" of {counted(total)}" if total and total != entry.get("rows") else ""
        rows.append(
            {
                "task": str(entry["task"]),
                "metric": metric_name(entry) + (", lower is better" if entry.get("higher_is_better") is False else ""),
                "fewshot": "–" if entry.get("fewshot") is None else str(entry["fewshot"]),
                "rows": f"{counted(entry['rows'])}{part}" if entry.get("rows") else "–",
                "before": _with_error(shown[before], errors[0], shown),
                "after": _with_error(shown[after], errors[1], shown),
                "change": "–" if difference is None else ("" if difference < 0 else "+") + shown[difference],
            }
        )
    return rows


def _with_error(score: str, error: float | None, shown: dict[float, str]) -> str:
    return score if error is None or not math.isfinite(error) else f"{score} ± {shown[error]}"


def metric_name(entry: dict[str, Any]) -> str:
    """The metric, with its filter where the task has some, such as "exact_match (strict-match)"."""
    name, part = entry["metric"], entry.get("filter") or "none"
    return name if part == "none" else f"{name} ({part})"


def benchmark_versions(entries: list[dict[str, Any]]) -> str:
    """The versions of lm-eval that the entries are of, mostly one."""
    return ", ".join(dict.fromkeys(str(entry["lm_eval"]) for entry in entries if entry.get("lm_eval")))


def benchmark_results(record: RunRecord, task_type: str) -> list[EvalResult]:
    """The entries for the model index: values with ±, which the Hub's form provides for. None that is not finite."""
    results = []
    for entry in record.benchmarks:
        for when, label in (("after", "with the adapter"), ("before", "base model")):
            value, error = as_number(entry.get(when)), as_number(entry.get(f"{when}_stderr"))
            if value is None or not math.isfinite(value):
                continue
            is_known = error is not None and math.isfinite(error)
            results.append(
                EvalResult(
                    task_type=task_type,
                    dataset_type=entry.get("dataset") or entry["task"],
                    dataset_name=entry["task"],
                    dataset_config=entry.get("dataset_config"),
                    dataset_args={"num_few_shot": entry.get("fewshot"), "rows": entry.get("rows")},
                    metric_type=entry["metric"],
                    metric_name=f"{entry['task']} {metric_name(entry)} ({label})",
                    metric_value=f"{value:.6g} ± {error:.2g}" if is_known else round(value, 6),
                    source_name=f"lm-eval {entry.get('lm_eval')}",
                    source_url=LM_EVAL,
                )
            )
    return results
