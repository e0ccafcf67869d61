"""The model card: a run record rendered as README.md, without network and without the model.

`card.md.jinja` has the text. What it shows that is not simply a field of the record is computed here.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..requirements import PIP_REQUIREMENT
from .edits import signed
from .escaping import cell, code, line, literal, text
from .front_matter import check_front_matter
from .methods import LORA_SB_PAPER, Method, method_named
from .record import RunRecord


# PEFT's task type: (the Hub's pipeline tag, transformers' class of the base model)
TEXT_GENERATION = ("text-generation", "AutoModelForCausalLM")
TASKS = {
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "SEQ_2_SEQ_LM": ("text-generation", "AutoModelForSeq2SeqLM"),
}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices of --max-lora-rank
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
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The card of a run: front matter and Markdown. What the record does not know is not in the card.

    Its last line is a mark by which `hf_reflora.report.edits.is_edited` tells whether somebody has changed the card.

    Args:
        record: The run's record.
        repo_id: The adapter's id on the Hub, for the snippets.
        plot: Name of the PNG beside the card.
        exported: The files are the exported, ordinary LoRA of a LoRA-SB adapter.
        native_folder: Folder beside the exported files that has the LoRA-SB adapter itself.
        license: Hub license id. Default: the record's, or none.
        language: Language code or codes of the adapter. Default: the record's, or none.
        tags: Further tags, beside the record's.

    Raises:
        ValueError: the record has an unknown method; or see `check_front_matter`.
    """
    method = _method(record, exported)
    wishes = record.card
    title = wishes.get("title") or f"{_short(record.base_model or record.model)} with {method.name}"
    title = repo_id.split("/")[-1] if repo_id else line(title)
    pipeline_tag, auto_class = TASKS.get(record.peft.get("task_type", ""), TEXT_GENERATION)
    pipeline_tag = wishes.get("task") or pipeline_tag
    language = language or wishes.get("language")
    datasets = [name for name in dict.fromkeys([record.dataset_id, *wishes.get("datasets", [])]) if name]
    compared = [{"name": n, "before": record.before[n], "after": record.after[n]} for n in record.compared_scores]
    base_model_relation: dict[str, Any] = {"base_model_relation": "adapter"} if record.base_model else {}
    data = ModelCardData(
        base_model=record.base_model,
        library_name="peft",
        pipeline_tag=pipeline_tag,
        license=license or wishes.get("license"),
        language=language if language is None or isinstance(language, str) else list(language),
        datasets=datasets or None,
        tags=_tags(record, [*method.tags, *record.tags, "transformers", *tags, *wishes.get("tags", [])]),
        model_name=title if compared else None,
        eval_results=_eval_results(record, pipeline_tag) if compared else None,
        **base_model_relation,
    )
    card = (
        _environment()
        .get_template("card.md.jinja")
        .render(
            front_matter=data.to_yaml(),
            title=title,
            record=record,
            method=method,
            scores=compared,
            plot=plot,
            repo_id=repo_id,
            native_folder=native_folder,
            pip_requirement=PIP_REQUIREMENT,
            auto_class=auto_class,
            texts=len(record.arguments.get("text_columns", [""])),
            vllm_rank=_vllm_rank(record),
            messages=_messages(record),
            facts=_facts(record),
            command=_command(record),
            limits=_limits(record),
        )
    )
    check_front_matter(card)
    return signed(card)


def _method(record: RunRecord, exported: bool) -> Method:
    """The record's method, with what its start and an export add to it."""
    method = method_named(record.method)
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


def _eval_results(record: RunRecord, task: str) -> list[EvalResult]:
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
    ]


def _messages(record: RunRecord) -> str | None:
    """The snippet's chat as Python source: the system prompt of the training and the first example."""
    if not record.arguments.get("system_prompt") or not record.examples:
        return None
    turns = [("system", record.arguments["system_prompt"]), ("user", record.examples[0]["prompt"])]
    lines = [f'{{"role": "{role}", "content": {literal(content)}}},' for role, content in turns]
    return "\n".join(["[", *(f"    {turn}" for turn in lines), "]"])


def _vllm_rank(record: RunRecord) -> int:
    """The smallest of vLLM's ranks that the adapter fits in."""
    ranks = record.diagnostics.get("ranks") or [record.arguments.get("lora_r", 64)]
    return next((rank for rank in VLLM_RANKS if rank >= ranks[-1]), VLLM_RANKS[-1])


def _command(record: RunRecord) -> str | None:
    command, processes = record.environment.get("command"), record.processes or 1
    if not command:
        return None
    options = ["--num_processes", str(processes)] if processes > 1 else []
    return shlex.join(["accelerate", "launch", *options, *command])


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """The training details that are known, in the order of interest."""
    environment, seconds, numbers = record.environment, record.seconds, record.diagnostics
    parameters, tokens = record.trainable_parameters, record.tokens
    facts: dict[str, Any] = {
        "trained parameters": f"{parameters:,}" if parameters is not None else None,
        "rank": " to ".join(map(str, dict.fromkeys(numbers.get("ranks", [])))),
        "adapted layers": numbers.get("layers"),
        "tensors with values that are not finite": numbers.get("not_finite"),
        "balance gap ‖AAᵀ − BᵀB‖/‖BᵀB‖, mean": f"{numbers['balance_gap']:.3g}" if "balance_gap" in numbers else None,
        "commit of the base model": record.base_revision,
        "rows": record.train_rows,
        "dataset configuration": record.dataset_config,
        "dataset split": record.dataset_split,
        "dataset commit": record.dataset_revision,
        "dataset fingerprint": record.dataset_fingerprint,
        "tokens": f"{tokens:,}" if tokens is not None else None,
        "optimizer steps": record.step,
        "seed": record.seed,
        "processes": record.processes,
        "backend": record.backend if (record.processes or 1) > 1 else None,
        "training time": f"{seconds['train']:.3g} s" if "train" in seconds else None,
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
    environment.filters |= {"text": text, "cell": cell, "code": code, "literal": literal, "number": "{:,}".format}
    return environment
