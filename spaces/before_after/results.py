"""What an adapter's run record and card say of its training, as the page shows it."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.repocard import REGEX_YAML_BLOCK


EXAMPLES = 5


class Results:
    """What the adapter in the folder or repository `source` says of itself; empty where it says nothing."""

    def __init__(self, source: str):
        try:
            self._read(_record(source), source)
        except (AttributeError, KeyError, TypeError, ValueError):  # a file of this name by somebody else
            self._read({}, source)

    def _read(self, record: dict[str, Any], source: str) -> None:
        scores = record.get("scores", {})
        before, after = scores.get("before", {}), scores.get("after", {})
        self.scores = [
            [name.replace("_", " "), round(before[name], 3), round(after[name], 3)] for name in before if name in after
        ]
        points = [(entry["step"], float(entry["loss"])) for entry in record.get("log", []) if "loss" in entry]
        self.losses = pd.DataFrame(points, columns=["step", "loss"])
        self.examples = [example["prompt"] for example in record.get("examples", [])][:EXAMPLES]
        self.system_prompt = record.get("arguments", {}).get("system_prompt", "")
        rows = f" Scores on {scores['rows']} evaluation rows." if scores.get("rows") else ""
        local = Path(source).exists()
        where = "" if local else f" [Its card](https://huggingface.co/{source})."
        self.text = f"Trained with {record['method']}.{rows}{where}" if record else f"It has no run record.{where}"
        self.card = _card(Path(source) / "README.md") if local else ""


def _card(path: Path) -> str:
    """The card of a folder, which has no address to link to; its pictures are of files that are not served."""
    if not path.is_file():
        return ""
    text = REGEX_YAML_BLOCK.sub("", path.read_text(encoding="utf-8", errors="replace"))
    return re.sub(r"!\[.*?\]\(.*?\)", "", text)


def _record(source: str) -> dict[str, Any]:
    path = Path(source) / "run_record.json"
    if not Path(source).exists():
        try:
            path = Path(hf_hub_download(source, "run_record.json"))
        except EntryNotFoundError:
            return {}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
