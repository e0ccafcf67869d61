"""What an adapter's run record says of its training: scores, losses, examples, as the page shows them."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


EXAMPLES = 5


class Results:
    """The results of the adapter in the folder or repository `source`; all empty if it has no run record."""

    def __init__(self, source: str):
        record = _record(source)
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
        where = "" if Path(source).exists() else f" [Its card](https://huggingface.co/{source})."
        self.text = f"Trained with {record['method']}.{rows}{where}" if record else f"It has no run record.{where}"


def _record(source: str) -> dict[str, Any]:
    path = Path(source) / "run_record.json"
    if not Path(source).exists():
        try:
            path = Path(hf_hub_download(source, "run_record.json"))
        except EntryNotFoundError:
            return {}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
