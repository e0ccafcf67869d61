"""The model card: a run record rendered as README.md, without network and without the model.

`card.md.jinja` has the text. What it shows that is not simply a field of the record is computed here.
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import yaml_dump
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..requirements import PIP_REQUIREMENT
from .edits import signed
from .escaping import cell, code, line, literal, text
from .front_matter import LICENSE_ENTRIES, OwnEntries, check_front_matter
from .methods import DORA, LORA_SB_PAPER, Method, method_named
from .numbers import alike, as_number, change, counted, rounded
from .record import RunRecord
from .serving import vllm_rank
from .tasks import task_of


EXPORTED = " Here s B R is folded into lora_B: these files are an ordinary LoRA with the same outputs."
SB_START = (
    " It started from LoRA-SB's subspace: B = U√S and A = √S Vᵀ of the best rank-r approximation of the first step of "
    "full fine-tuning."
)


def render(
    record: RunRecord,
    *,
    repo_id: str | None = None,
    plot: str | None = None,
    exported: bool = False,
    native_folder: str | None = None,
    license: str | list[str] | None = None,
    language: str | list[str] | None = None,
    tags: Sequence[str] = (),
    more: Mapping[str, Any] | None = None,
) -> str:
    """The card of a run: front matter and Markdown. What the record does not know is not in the card.

    Its last line is a mark by which `hf_reflora.report.edits.is_edited` tells whether somebody has changed the card.

    Args:
        record: The run's record.
        repo_id: The adapter's id on the Hub, for the snippets.
        plot: Name of the PNG beside the card.
        exported: The files are the exported, ordinary LoRA of a LoRA-SB adapter.
        native_folder: Folder beside the exported files that has the LoRA-SB adapter itself.
        license: Hub license id or ids. Default: the record's, or none.
        language: Language code or codes of the adapter. Default: the record's, or none.
        tags: Further tags, beside the record's.
        more: Further entries of the front matter, see `hf_reflora.report.front_matter.OwnEntries`.

    Raises:
        ValueError: the record has an unknown method; or see `check_front_matter`.
    """
    entries = OwnEntries(license, language, list(tags), dict(more or {}))
    record = with_base(record, entries.more.get("base_model"))
    method, task = _method(record, exported), task_of(record)
    title = record.card.get("title") or f"{_short(record.base_model or record.model)} with {method.name}"
    title = repo_id.split("/")[-1] if repo_id else line(title)
    card = (
        _environment()
        .get_template("card.md.jinja")
        .render(
            front_matter=_front_matter(record, method, title, entries),
            title=title,
            record=record,
            method=method,
            task=task,
            base_class=(record.peft.get("auto_mapping") or {}).get("base_model_class"),
            scores=_scores(record),
            evaluations=_evaluations(record),
            plot=plot,
            pages=_pages(record),
            repo_id=repo_id,
            native_folder=native_folder,
            pip_requirement=PIP_REQUIREMENT,
            texts=len(record.arguments.get("text_columns") or [""]),
            vllm_rank=vllm_rank(record, exported) if task.is_generation and not method.native else None,
            messages=_messages(record),
            facts=_facts(record),
            command=_command(record),
            limits=_limits(record),
        )
    )
    check_front_matter(card)
    return signed(card)


def with_base(record: RunRecord, base_model: Any) -> RunRecord:
    """The record with the base model that a person has named in the card, if the record knows none on the Hub.

    PEFT writes the name by which the model was loaded into the card, too, and if it is a path, it may look like an id.
    """
    if record.base_model is not None or not isinstance(base_model, str) or base_model == record.model:
        return record
    return RunRecord.from_dict({**record.to_dict(), "base_model": base_model})


def _front_matter(record: RunRecord, method: Method, title: str, own: OwnEntries) -> str:
    """The front matter: the record's entries with a person's own, and beside our results those of others."""
    wishes, task, more = record.card, task_of(record), dict(own.more)
    theirs = {name: more.pop(name, None) for name in ("pipeline_tag", "library_name", "datasets", "model-index")}
    pipeline_tag = wishes.get("task") or theirs["pipeline_tag"] or task.pipeline_tag
    language = own.language or wishes.get("language")
    is_transformers = task.model_class is not None or not record.peft.get("auto_mapping")
    tags = [*method.tags, *record.tags, *(["transformers"] if is_transformers else [])]
    if "Trackio" in (pages := dict(_pages(record))):  # by which the Hub shows the run on the adapter's page
        tags = [*(tag for tag in tags if not tag.startswith("trackio")), "trackio", f"trackio:{pages['Trackio']}"]
    datasets = [record.dataset_id, *wishes.get("datasets", []), *(theirs["datasets"] or [])]
    base_model_relation: dict[str, Any] = {"base_model_relation": "adapter"} if record.base_model else {}
    results = _eval_results(record, pipeline_tag or "other")
    data = ModelCardData(
        base_model=record.base_model,
        library_name=theirs["library_name"] or "peft",
        pipeline_tag=pipeline_tag,
        license=cast(Any, own.license or wishes.get("license")),  # the Hub takes a list, too
        language=language if language is None or isinstance(language, str) else list(language),
        datasets=[name for name in dict.fromkeys(datasets) if name] or None,
        tags=_tags(record, [*tags, *own.tags, *wishes.get("tags", [])]),
        model_name=title if results else None,
        eval_results=results or None,
        **base_model_relation,
    )
    entries = data.to_dict()
    more = {name: value for name, value in more.items() if name != "base_model" or _names(value, data.base_model)}
    if data.license is None:
        more = {name: value for name, value in more.items() if name not in LICENSE_ENTRIES}
    if others := theirs["model-index"]:
        [ours] = entries.get("model-index") or [{"name": title, "results": []}]
        results = [*ours["results"], *(result for model in others for result in model["results"])]
        entries["model-index"] = [{**ours, "results": results}]
    return yaml_dump({**entries, **more}, sort_keys=False).strip()


def _pages(record: RunRecord) -> list[tuple[str, str]]:
    """The trackers' pages of the run, by name: only addresses on the web, which cannot end the link they stand in."""
    pages = ((name, url) for name, url in record.trackers.items() if isinstance(url, str))
    return [(name, url) for name, url in pages if re.fullmatch(r"https?://[^\s<>]+", url)]


def _names(bases: Any, base_model: Any) -> bool:
    """Whether a person has named several base models, this one among them."""
    return isinstance(bases, list) and base_model in bases


def _method(record: RunRecord, exported: bool) -> Method:
    """The record's method, with what its start and an export add to it."""
    method = method_named(record.method)
    if record.method == "lora" and record.peft.get("use_dora"):
        method = DORA
    if exported:
        method = replace(method, tags=["lora", *method.tags], text=method.text + EXPORTED, native=False)
    if record.init == "lora_sb":
        papers = [*method.papers, LORA_SB_PAPER]
        method = replace(method, tags=[*method.tags, "lora-sb"], text=method.text + SB_START, papers=papers)
    return method


def _short(name: str) -> str:
    return re.split(r"[/\\:]", name)[-1]


def _tags(record: RunRecord, tags: list[str]) -> list[str]:
    # The Hub's inference providers find adapters by the first tag.
    tags = [f"base_model:adapter:{record.base_model}", *tags] if record.base_model else tags
    return list(dict.fromkeys(line(tag) for tag in tags))


def _scores(record: RunRecord) -> list[dict[str, str]]:
    """The scores before and after, as text. A score that is not finite has no change."""
    rows = []
    for name in record.compared_scores:
        before, after = record.before[name], record.after[name]
        difference = change(before, after)
        texts = alike([before, after, *([] if difference is None else [difference])])
        shown = "–" if difference is None else texts[2] if difference < 0 else f"+{texts[2]}"
        rows.append({"name": name, "before": texts[0], "after": texts[1], "change": shown})
    return rows


def _evaluations(record: RunRecord) -> list[list[str]]:
    """The losses by step, of the training and of the evaluations, if there were evaluations; a header comes first."""
    rows, training = [], "–"
    for entry in record.log:
        loss = as_number(entry.get("loss"))
        training = training if loss is None else f"{loss:.4g}"
        loss = as_number(entry.get("eval_loss"))
        if loss is not None and entry.get("step"):
            rows.append([str(entry["step"]), training, f"{loss:.4g}"])
    return [["step", "training loss", "evaluation loss"], *rows] if rows else []


def _eval_results(record: RunRecord, task: str) -> list[EvalResult]:
    """The scores for the model index, but for those that are not finite, which JSON does not have."""
    dataset = record.dataset_id or line(_short(record.dataset or "evaluation rows"))
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=_short(dataset),
            metric_type=name,
            metric_name=f"{name} ({label})",
            metric_value=round(scores[name], 6),
        )
        for name in record.compared_scores
        for scores, label in ((record.after, "with the adapter"), (record.before, "base model"))
        if math.isfinite(scores[name])
    ]


def _messages(record: RunRecord) -> str | None:
    """The snippet's chat as Python source: the system prompt of the training and the first example."""
    if not record.arguments.get("system_prompt") or not record.examples:
        return None
    turns = [("system", record.arguments["system_prompt"]), ("user", record.examples[0]["prompt"])]
    lines = [f'{{"role": "{role}", "content": {literal(content)}}},' for role, content in turns]
    return "\n".join(["[", *(f"    {turn}" for turn in lines), "]"])


def _command(record: RunRecord) -> str | None:
    command, processes = record.environment.get("command"), as_number(record.processes) or 1
    if not command:
        return None
    options = ["--num_processes", str(processes)] if processes > 1 else []
    return shlex.join(["accelerate", "launch", *options, *command])


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """The training details that are known, in the order of interest."""
    environment, numbers = record.environment, record.diagnostics
    facts: dict[str, Any] = {
        "trained parameters": None if record.trainable_parameters is None else counted(record.trainable_parameters),
        "rank": " to ".join(map(str, dict.fromkeys(numbers.get("ranks") or []))),
        "adapted layers": numbers.get("layers") or None,
        "tensors with values that are not finite": numbers.get("not_finite"),
        "balance gap ‖AAᵀ − BᵀB‖/‖BᵀB‖, mean": rounded(numbers.get("balance_gap")),
        "commit of the base model": record.base_revision,
        "rows": record.train_rows,
        "dataset configuration": record.dataset_config,
        "dataset split": record.dataset_split,
        "dataset commit": record.dataset_revision,
        "dataset fingerprint": record.dataset_fingerprint,
        "tokens": None if record.tokens is None else counted(record.tokens),
        "optimizer steps": record.step,
        "seed": record.seed,
        "processes": record.processes,
        "backend": record.backend if (as_number(record.processes) or 1) > 1 else None,
        "training time": f"{seconds} s" if (seconds := rounded(record.seconds.get("train"))) else None,
        "peak memory": ", ".join(f"{name} {gb} GB" for name, gb in record.peak_memory_gb.items()),
        "hardware": ", ".join(environment.get("gpus") or [environment.get("cpu") or ""]),
        **{name: value for name, value in record.arguments.items() if name != "output_dir"},
        "versions": ", ".join(f"{name} {v}" for name, v in sorted(environment.get("versions", {}).items())),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "", [], {})]


def _limits(record: RunRecord) -> list[str]:
    limits = ["It inherits the limits and the license terms of its base model."]
    if record.evaluation_rows:
        limits.append(
            f"The scores are of {record.evaluation_rows} rows; nothing else was measured. They are one run"
            + (f" (seed {record.seed})" if record.seed is not None else "")
            + ", and another seed would give others."
        )
    losses = [loss for _, loss in record.losses]
    if broken := sum(not math.isfinite(loss) for loss in losses):
        limits.append(f"{broken} of the {len(losses)} logged training losses are not finite.")
    if record.labels:
        limits.append(
            "The classifier on top of the base model was trained along with the adapter; before training it was the "
            "base model's own, or random if that has none."
        )
    return limits


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hf_reflora", "report"),
        undefined=StrictUndefined,  # a misspelt name raises instead of leaving a gap in the card
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": text, "cell": cell, "code": code, "literal": literal, "number": counted}
    return environment
