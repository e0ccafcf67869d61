"""The model card: a run record rendered as README.md, without network or model, and checks of its front matter."""

import hashlib
import html
import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from . import methods as papers
from .ids import is_hub_id


# What the Hub accepts as license (its documentation, "Licenses").
LICENSES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other""".split()
)
# method: (name, tags, papers, one sentence, what it does)
METHODS = {
    "lora": (
        "LoRA",
        ["lora"],
        [],
        "This is a LoRA adapter.",
        "LoRA trains B and A in W = W0 + s B A.",
    ),
    "reflora": (
        "RefLoRA",
        ["lora", "reflora"],
        [papers.REFLORA],
        "This is a LoRA adapter trained with RefLoRA.",
        "At every step RefLoRA takes the factorization of the update B A whose next step lowers the loss bound most. "
        "With P = A Aᵀ and Q = BᵀB it is given by the matrix geometric mean S = P⁻¹ # Q, and the gradients become "
        "∇A ← S⁻¹ ∇A, ∇B ← ∇B S before the optimizer's step. The result is an ordinary LoRA.",
    ),
    "reflora_s": (
        "RefLoRA-S",
        ["lora", "reflora"],
        [papers.REFLORA],
        "This is a LoRA adapter trained with RefLoRA-S.",
        "RefLoRA-S keeps the factors of the update B A of one size: S = s I with s = ‖B‖/‖A‖, RefLoRA's scalar case. "
        "The result is an ordinary LoRA.",
    ),
    "lora_sb": (
        "LoRA-SB",
        ["lora-sb"],
        [papers.LORA_SB],
        "This is a LoRA-SB adapter.",
        "LoRA-SB trains R, r × r, in W = W0 + s B R A. B, R and A start as the best approximation of rank r of the "
        "first step of full fine-tuning, ΔW = −η sign(Σ∇), and B and A stay as they are.",
    ),
    "lora_xs": (
        "LoRA-XS",
        ["lora-sb", "lora-xs"],
        [],
        "This is a LoRA-XS adapter.",
        "LoRA-XS trains R, r × r, in W = W0 + s B R A, with B and A from the leading singular vectors of W0.",
    ),
}
TRL_TAGS = ("sft", "trl")
# Tags that a library adds, not the user.
COMPUTED_TAGS = {*TRL_TAGS, "transformers", "generated_from_trainer", "peft"}
# What the cards have that nobody wrote: PEFT's, of huggingface_hub's template (39 times), TRL's and transformers'.
PLACEHOLDER = "[More Information Needed]"
GENERATED = (
    "It has been trained using [TRL]",
    "generated automatically according to the information the Trainer had access to",
)
MARK = re.compile(r"<!-- rendered by hf_reflora; as long as nobody edits it: ([0-9a-f]{16}) -->")
# PEFT writes below any card when it saves an adapter beside it.
ADDED_BY_PEFT = re.compile(
    r"\s*(## Training procedure\s+The following `bitsandbytes` quantization config was used during training:"
    r"(\n- .*)+\s*)?(### Framework versions(\s+- PEFT \S+)+\s*)?"
)
FRONT_MATTER = {
    *("base_model", "base_model_relation", "datasets", "language", "library_name", "license", "model-index"),
    *("pipeline_tag", "tags"),
}
# Methods whose adapters are LoraSbConfig's, which only hf_reflora loads before an export.
NATIVE = ("lora_sb", "lora_xs")
# PEFT's task type: (the Hub's pipeline tag, transformers' class of the base model)
TEXT_GENERATION = ("text-generation", "AutoModelForCausalLM")
TASKS = {
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "SEQ_2_SEQ_LM": ("text-generation", "AutoModelForSeq2SeqLM"),
}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
SB_START = (
    " It started from LoRA-SB's subspace: B = U√S and A = √S Vᵀ of the best rank-r approximation of the first step of "
    "full fine-tuning."
)


def render(
    record: dict[str, Any],
    *,
    repo_id: str | None = None,
    plot: str | None = None,
    exported: bool = False,
    native_folder: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The card of a run: front matter and Markdown. Pure: what the record does not know is not in the card.

    Its last line is a mark by which `is_edited` tells whether somebody has changed the card since.

    Args:
        record: A run record (`run_record.json`).
        repo_id: The adapter's id on the Hub, for the snippets.
        plot: Name of the PNG beside the card.
        exported: The files are the exported, ordinary LoRA of a LoRA-SB adapter.
        native_folder: Folder beside the exported files that has the LoRA-SB adapter itself.
        license: Hub license id. Default: the record's, or none.
        language: Language code or codes of the adapter. Default: the record's, or none.
        tags: Further tags, beside the record's.

    Raises:
        ValueError: see `check_front_matter`.
    """
    name, method_tags, cited, sentence, text = METHODS[record["method"]]
    wishes = record.get("card", {})
    license, language = license or wishes.get("license"), language or wishes.get("language")
    tags = [*tags, *wishes.get("tags", [])]
    base_model, dataset_id = _hub_id(record, "base_model", "model"), _hub_id(record, "dataset_id", "dataset")
    sb_start = record.get("init") == "lora_sb"
    if sb_start:
        cited, method_tags = [*cited, papers.LORA_SB], [*method_tags, "lora-sb"]
    native = record["method"] in NATIVE and not exported
    pipeline_tag, auto_class = TASKS.get((record.get("peft") or {}).get("task_type"), TEXT_GENERATION)
    if exported:
        method_tags = ["lora", *method_tags]
        text += " Here s B R is folded into lora_B: these files are an ordinary LoRA with the same outputs."
    rows = record["scores"].get("rows", 0)
    before, after = record["scores"].get("before", {}), record["scores"].get("after", {})
    scores = [{"name": key, "before": before[key], "after": after[key]} for key in before if key in after]
    title = wishes.get("title") or f"{_short(base_model or record['model'])} with {name}"
    title = repo_id.split("/")[-1] if repo_id else _line(title)
    environment = record.get("environment", {})
    card_data = ModelCardData(
        base_model=base_model,
        library_name="peft",
        pipeline_tag=pipeline_tag,
        license=license,
        language=list(language) if isinstance(language, list | tuple) else language,
        datasets=[dataset_id] if dataset_id else None,
        tags=_tags(base_model, [*method_tags, *record.get("tags", TRL_TAGS), "transformers", *tags]),
        model_name=title if scores else None,
        eval_results=_eval_results(record, scores, dataset_id, pipeline_tag) if scores else None,
        **({"base_model_relation": "adapter"} if base_model else {}),
    )
    template = _environment().get_template("card.md.jinja")
    card = template.render(
        front_matter=card_data.to_yaml(),
        title=title,
        method={"sentence": sentence, "text": text + (SB_START if sb_start else "")},
        base_model=base_model,
        model=record["model"],
        dataset=record.get("dataset"),
        dataset_id=dataset_id,
        train_rows=record.get("train_rows"),
        rows=rows,
        split=record["scores"].get("split"),
        scores=scores,
        examples=record.get("examples", []),
        plot=plot,
        native=native,
        native_folder=native_folder,
        auto_class=auto_class,
        labels=record.get("labels"),
        texts=len(record.get("arguments", {}).get("text_columns", [""])),
        repo_id=repo_id,
        vllm_rank=_vllm_rank(record),
        messages=_messages(record),
        facts=_facts(record),
        command=_command(record),
        commit=environment.get("commit"),
        changed=environment.get("uncommitted_changes"),
        runs=record.get("runs", []),
        limits=_limits(record, rows),
        papers=cited,
    )
    check_front_matter(card)
    digest = _digest(card.split("---\n", 2)[2])
    return f"{card}\n<!-- rendered by hf_reflora; as long as nobody edits it: {digest} -->\n"


def is_edited(card: str) -> bool:
    """Whether a card was written or changed by hand, and not just rendered here or by PEFT, TRL or transformers.

    License, language and tags may be other ones: those are kept anyway, see `kept`.
    """
    body = f"{card}\n".split("---\n", 2)[-1] if card.startswith("---\n") else card
    mark = MARK.search(body)
    if mark is None:
        generated = card.count(PLACEHOLDER) > 35 or any(phrase in card for phrase in GENERATED)
        return bool(body.strip()) and not generated
    changed = mark[1] != _digest(body[: mark.start()]) or not ADDED_BY_PEFT.fullmatch(body[mark.end() :])
    try:
        return changed or not set(_front_matter(card)) <= FRONT_MATTER
    except ValueError:
        return True


def kept(card: str) -> dict[str, Any]:
    """What a card's front matter says that no record knows: license, language and the user's own tags.

    Raises:
        ValueError: the front matter cannot be read.
    """
    data = _front_matter(card)
    tags = data.get("tags") if isinstance(data.get("tags"), list) else []
    known = {tag for _, method_tags, *_ in METHODS.values() for tag in method_tags} | COMPUTED_TAGS
    own = [tag for tag in tags if isinstance(tag, str) and tag not in known and not tag.startswith("base_model:")]
    license = data.get("license")
    return {
        "license": license if license in LICENSES else None,
        "language": data.get("language"),
        "tags": own,
    }


def _digest(body: str) -> str:
    return hashlib.sha256(body.strip().encode()).hexdigest()[:16]


def _front_matter(card: str) -> dict[str, Any]:
    if not card.startswith("---\n"):
        return {}
    try:
        data = yaml.safe_load(f"{card}\n".split("---\n", 2)[1])
    except (yaml.YAMLError, IndexError) as error:
        raise ValueError(f"The card has no front matter that can be read: {error}") from error
    return data if isinstance(data, dict) else {}


def check_front_matter(card: str) -> None:
    """Raises a ValueError that lists everything in a card's front matter which the Hub would refuse or misread.

    Ids that are paths or empty, unknown licenses, lists that are strings, a malformed model-index. The Hub's own check
    needs the network; this one does not.
    """
    try:
        data = ModelCard(card, ignore_metadata_errors=False).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"The card has no front matter that can be read: {error}") from error
    raw = _front_matter(card)
    wrong = []
    if "base_model" in raw and not is_hub_id(raw["base_model"]):
        wrong.append(f"base_model must be an id on the Hub, got {raw['base_model']!r}")
    for key in ("datasets", "tags"):
        value = raw.get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
            wrong.append(f"{key} must be a list of names, got {value!r}")
        elif key == "datasets":
            wrong += [f"datasets must be ids on the Hub, got {entry!r}" for entry in value if not is_hub_id(entry)]
    if "license" in raw and raw["license"] not in LICENSES:
        wrong.append(_wrong_license(raw["license"]))
    if "library_name" not in raw:
        wrong.append("library_name is missing")
    if "model-index" in raw and not data.get("model-index"):
        wrong.append("model-index must be a list of models with results")
    if wrong:
        raise ValueError("The card's front matter is wrong: " + "; ".join(wrong) + ".")


def check_license(license: str | None) -> None:
    """Raises a ValueError for a license that the Hub does not know; None is none."""
    if license is not None and license not in LICENSES:
        raise ValueError(f"The card's front matter is wrong: {_wrong_license(license)}.")


def _wrong_license(license: Any) -> str:
    return f"license {license!r} is not one of the Hub's, such as apache-2.0, mit, cc-by-4.0, llama3.2"


def _hub_id(record: dict[str, Any], known: str, named: str) -> str | None:
    """The id the record found to be one; in older records, a name of its form."""
    if known in record:
        return record[known]
    return record.get(named) if is_hub_id(record.get(named)) else None


def _short(name: str) -> str:
    return re.split(r"[/\\:]", name)[-1]


def _tags(base_model: str | None, tags: list[str]) -> list[str]:
    tags = [f"base_model:adapter:{base_model}", *tags] if base_model else tags
    return list(dict.fromkeys(_line(tag) for tag in tags))


def _eval_results(
    record: dict[str, Any], scores: list[dict[str, Any]], dataset_id: str | None, task: str
) -> list[EvalResult]:
    dataset = dataset_id or _line(_short(record.get("dataset") or "evaluation rows"))
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=_short(dataset),
            metric_type=score["name"],
            metric_name=f"{score['name']} ({'base model' if when == 'before' else 'with the adapter'})",
            metric_value=round(score[when], 6),
        )
        for score in scores
        for when in ("after", "before")
    ]


def _messages(record: dict[str, Any]) -> str | None:
    """The chat of the snippet as Python source, with the system turn of the training."""
    arguments, examples = record.get("arguments", {}), record.get("examples", [])
    if not arguments.get("system_prompt") or not examples:
        return None
    turns = [("system", arguments["system_prompt"]), ("user", examples[0]["prompt"])]
    lines = [f'{{"role": "{role}", "content": {_json(text)}}},' for role, text in turns]
    return "\n".join(["[", *(f"    {line}" for line in lines), "]"])


def _vllm_rank(record: dict[str, Any]) -> int:
    """The smallest `--max-lora-rank` of vLLM's choices that the adapter fits in."""
    ranks = record.get("diagnostics", {}).get("ranks") or [record.get("arguments", {}).get("lora_r", 64)]
    return next((rank for rank in VLLM_RANKS if rank >= ranks[-1]), VLLM_RANKS[-1])


def _command(record: dict[str, Any]) -> str | None:
    command, processes = record.get("environment", {}).get("command"), record.get("processes", 1)
    if not command:
        return None
    options = ["--num_processes", str(processes)] if processes > 1 else []
    return shlex.join(["accelerate", "launch", *options, *command])


def _facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Training details in order of interest, known ones only."""
    environment, seconds, found = (record.get(name, {}) for name in ("environment", "seconds", "diagnostics"))
    facts: dict[str, Any] = {
        "trained parameters": f"{record['trainable_parameters']:,}" if "trainable_parameters" in record else None,
        "rank": " to ".join(map(str, dict.fromkeys(found.get("ranks", [])))),
        "adapted layers": found.get("layers"),
        "balance gap ‖AAᵀ − BᵀB‖/‖BᵀB‖, mean": f"{found['balance_gap']:.3g}" if "balance_gap" in found else None,
        "commit of the base model": record.get("base_revision"),
        "rows": record.get("train_rows"),
        "dataset configuration": record.get("dataset_config"),
        "dataset split": record.get("dataset_split"),
        "dataset commit": record.get("dataset_revision"),
        "dataset fingerprint": record.get("dataset_fingerprint"),
        "tokens": f"{record['tokens']:,}" if "tokens" in record else None,
        "optimizer steps": record.get("step"),
        "seed": record.get("seed"),
        "processes": record.get("processes"),
        "backend": record.get("backend") if record.get("processes", 1) > 1 else None,
        "training time": f"{seconds['train']:.3g} s" if "train" in seconds else None,
        "peak memory": ", ".join(f"{n} {gb} GB" for n, gb in record.get("peak_memory_gb", {}).items()),
        "hardware": ", ".join(environment.get("gpus") or [environment.get("cpu") or ""]),
        **{name: value for name, value in record.get("arguments", {}).items() if name != "output_dir"},
        "versions": ", ".join(f"{n} {v}" for n, v in sorted(environment.get("versions", {}).items())),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "", [], {})]


def _limits(record: dict[str, Any], rows: int) -> list[str]:
    limits = ["It inherits the limits and the license terms of its base model."]
    if rows:
        limits.append(
            f"The scores are of {rows} rows; nothing else was measured. They are one run"
            + (f" (seed {record['seed']})" if "seed" in record else "")
            + ", and another seed would give others."
        )
    if record.get("labels"):
        limits.append(
            "The classifier on top of the base model was trained along with the adapter; before training it was the "
            "base model's own, or random if that has none."
        )
    return limits


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hf_reflora", "report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": _text, "cell": _cell, "code": _code, "literal": _literal, "number": "{:,}".format}
    return environment


def _line(value: Any) -> str:
    """Without line breaks, so that it can end neither a front matter, nor a table, nor a code block."""
    return " ".join(str(value).split())


def _text(value: Any) -> str:
    """Text that is neither HTML nor Markdown, on one line."""
    text = html.escape(_line(value), quote=False)
    return re.sub(r"([\\`*_{}\[\]|#~$])", r"\\\1", text)


def _cell(value: Any, length: int = 160) -> str:
    value = _line(value)
    return _text(value if len(value) <= length else value[: length - 2] + " …")


def _code(value: Any) -> str:
    """Inline code, whatever backticks it has."""
    value = _line(value)
    fence = "`" * (max([0, *map(len, re.findall("`+", value))]) + 1)
    return f"{fence} {value} {fence}" if len(fence) > 1 else f"`{value}`"


def _literal(value: Any) -> str:
    """A Python string literal on one line."""
    return _json(str(value))


def _json(text: str) -> str:
    """On one line for everybody: PEFT splits the card's lines at the separators of Unicode, too."""
    return re.sub(r"[\x7f-\x9f\u2028\u2029]", lambda m: f"\\u{ord(m[0]):04x}", json.dumps(text, ensure_ascii=False))
