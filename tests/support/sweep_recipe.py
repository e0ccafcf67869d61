"""A recipe for the sweep's tests that takes no time: its loss is a parabola in the logarithm of the learning rate.

Each start leaves a line in `starts.txt` beside the runs. The option `wait` is a number of starts to wait for, `fail` a
file whose absence is an error.
"""

import json
import math
import sys
import time
from pathlib import Path

import yaml


options = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text(encoding="utf-8"))
folder = Path(options["output_dir"])
starts = folder.parent / "starts.txt"
with starts.open("a", encoding="utf-8") as file:
    file.write(f"{folder.name}\n")
if "fail" in options and not Path(options["fail"]).exists():
    sys.exit(f"there is no {options['fail']}")
while len(starts.read_text(encoding="utf-8").splitlines()) < options.get("wait", 0):
    time.sleep(0.05)
time.sleep(options.get("sleep", 0))

rate = options["learning_rate"]
loss = (math.log10(rate) + 2.5) ** 2 + 0.01 * options.get("seed", 0) + (options["method"] == "reflora")
if rate > 0.5:
    loss = math.nan
record = {
    "schema": 2,
    "method": options["method"],
    "model": "tiny",
    "scores": {"after": {"loss": loss if math.isfinite(loss) else "nan", "exact": 1 / (1 + abs(loss))}},
    "log": [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5}, {"step": 2, "eval_loss": 1.25}],
    "trainable_parameters": 10,
    "seconds": {"total": 60.0},
}
(folder / "run_record.json").write_text(json.dumps(record), encoding="utf-8")
