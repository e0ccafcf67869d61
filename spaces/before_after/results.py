"""What an adapter's run record and card tell about its training, as the page shows it."""

import json
import re
from pathlib import Path
from textwrap import shorten
from typing import Any

import pandas as pd
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.repocard import REGEX_YAML_BLOCK


MAX_EXAMPLES = 5
LONGEST_TASK = 120  # characters of a system prompt that the heading shows
METHODS = {"lora": "LoRA", "reflora": "RefLoRA", "reflora_s": "RefLoRA-S", "lora_sb": "LoRA-SB", "lora_xs": "LoRA-XS"}


class Results:
    """What is known of the adapter in the folder or Hub repository `source`.

    Attributes:
        text: A line on its training, Markdown.
        task: What it was trained to do in a sentence, Markdown; may be empty.
        headline: Its scores before and after in a line, Markdown; may be empty.
        scores: [name, before, after] of each score on held-out rows; may be empty.
        losses: Columns step and loss; may be empty.
        examples: Held-out rows with "prompt", "before", "after" and "reference"; may be empty.
        system_prompt: The one it was trained with, or "".
        card: The card of an adapter in a folder, without its front matter; "" for one on the Hub, which is linked.
    """

    def __init__(self, source: str):
        try:
            self._read(_record(source), source)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            # Anybody may have a file of this name, with anything in it: it is then no run record.
            self._read({}, source)

    def _read(self, record: dict[str, Any], source: str) -> None:
        scores = record.get("scores") or {}
        before, after = scores.get("before") or {}, scores.get("after") or {}
        self.scores = [
            [name.replace("_", " "), round(before[name], 3), round(after[name], 3)] for name in before if name in after
        ]
        points = [(entry["step"], float(entry["loss"])) for entry in record.get("log") or [] if "loss" in entry]
        self.losses = pd.DataFrame(points, columns=["step", "loss"])
        examples = (record.get("examples") or [])[:MAX_EXAMPLES]
        self.examples = [
            {name: str(example.get(name) or "") for name in ("prompt", "before", "after", "reference")}
            for example in examples
            if example["prompt"]
        ]
        self.system_prompt = (record.get("arguments") or {}).get("system_prompt") or ""
        rows = f" on {scores['rows']:,} held-out rows" if scores.get("rows") else ""
        shown = [f"**{_plain(name)}** {old:.2f} → **{new:.2f}**" for name, old, new in self.scores if name != "loss"]
        self.headline = " · ".join(shown[:3]) + rows if shown else ""
        is_local = Path(source).exists()
        where = "" if is_local else f" [Its card](https://huggingface.co/{source})."
        training = _training(record) if record else ""
        self.text = f"{training or 'It has no run record'}.{where}"
        prompt = self.system_prompt.strip().partition("\n")[0]
        prompt = shorten(prompt, LONGEST_TASK, placeholder=" …")
        self.task = f"{training} to follow the system prompt “{_plain(prompt)}”" if prompt else training
        self.card = _card(Path(source) / "README.md") if is_local else ""


def _training(record: dict[str, Any]) -> str:
    """How it was trained, without the full stop."""
    method = METHODS.get(record["method"], str(record["method"]))
    rows = f"{record['train_rows']:,} rows of " if record.get("train_rows") else ""
    data = f" on {rows}{Path(str(record['dataset'])).name}" if record.get("dataset") else ""
    return _plain(f"Trained with {method}{data}")


def _plain(text: str) -> str:
    """Text of somebody's record as Markdown that shows it as it is: without links, pictures or formulas."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~$])", r"\\\1", text)


def _card(path: Path) -> str:
    """A card's text without its front matter and without its pictures, whose files the page does not serve."""
    if not path.is_file():
        return ""
    text = REGEX_YAML_BLOCK.sub("", path.read_text(encoding="utf-8", errors="replace"))
    return re.sub(r"!\[.*?\]\(.*?\)", "", text)


def _record(source: str) -> dict[str, Any]:
    """The run record beside an adapter, or {} if there is none."""
    path = Path(source) / "run_record.json"
    if not Path(source).exists():
        try:
            path = Path(hf_hub_download(source, "run_record.json"))
        except EntryNotFoundError:
            return {}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
