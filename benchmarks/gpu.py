"""Runs on one GPU what was otherwise only tested on CPUs, in at most nine minutes and without network.

    python benchmarks/gpu.py [--record gpu.json] [--only sync cuda_graph]
    python benchmarks/gpu.py --dry    # the same parts in miniature on a CPU

Each part is a function in benchmarks/on_gpu/ and runs in a process of its own with a time limit, so that one failure
does not stop the others. A part that needs what the machine lacks (bitsandbytes, a GPU, …) is skipped and says so.
Prints a table, writes one JSON record, and exits with the status 1 if a part has failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
# The time limit of each part, in seconds. Those that answer the most questions come first, in case the time is short.
PARTS = {
    "tests": 150,
    "agreement": 40,
    "sync": 40,
    "cuda_graph": 40,
    "step_cost": 80,
    "mixed_precision": 60,
    "whole_step": 120,
    "init_cost": 80,
    "qlora": 90,
    "ddp": 60,
    "fsdp2": 60,
    "space": 60,
}
BUDGET = 9 * 60  # seconds for all parts
PATIENCE = 10  # of a dry run, which may meet a busy machine: so many times these limits


def run_part(name: str, dry: bool, limit: float) -> dict:
    """Runs one part in a process of its own; what came of it: its "status", "reason" or "figures", and "seconds"."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--part", name, "--result", result, *(["--dry"] if dry else [])]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, env=environment_of_parts(dry)
            )
        except subprocess.TimeoutExpired:
            outcome = {"status": "failed", "reason": f"took longer than {limit:.0f} s"}
        else:
            if result.exists():
                outcome = json.loads(result.read_text(encoding="utf-8"))
            else:  # a crash below Python
                outcome = {"status": "failed", "reason": f"exit status {done.returncode}: {done.stderr[-2000:]}"}
    return outcome | {"seconds": round(time.monotonic() - begin, 1)}


def environment_of_parts(dry: bool) -> dict[str, str]:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    if dry:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return environment


def perform(name: str, dry: bool) -> dict:
    """Runs one part in this process."""
    # Only here, where a library that is missing or broken costs no more than this part.
    try:
        from on_gpu import correctness, speed
        from on_gpu.setting import Setting, Skipped
    except ModuleNotFoundError as error:
        return {"status": "skipped", "reason": str(error)}
    try:
        part = getattr(speed, name, None) or getattr(correctness, name)
        return {"status": "ok", "figures": part(Setting(dry))}
    except (Skipped, ModuleNotFoundError) as error:
        return {"status": "skipped", "reason": str(error)}
    except Exception as error:
        import traceback

        last = "".join(traceback.format_exception(error)[-3:])
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}", "traceback": last}


def table(parts: dict[str, dict]) -> str:
    """A Markdown table with one row a part."""
    rows = ["| part | status | seconds | figures |", "| --- | --- | ---: | --- |"]
    for name, outcome in parts.items():
        said = outcome.get("reason") or json.dumps(outcome.get("figures", {}), ensure_ascii=False)
        said = " ".join(said.split()).replace("|", "/").replace('"', "")
        said = said if len(said) <= 160 else said[:159] + "…"
        rows.append(f"| {name} | {outcome['status']} | {outcome['seconds']:.0f} | {said} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, to test the parts themselves")
    parser.add_argument("--record", type=Path, default=Path("gpu.json"), help="the JSON file to write")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="these parts")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # runs it in this process
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        options.result.write_text(json.dumps(perform(options.part, options.dry)), encoding="utf-8")
        return 0
    begin, parts, patience = time.monotonic(), {}, PATIENCE if options.dry else 1
    for name in options.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        left = BUDGET * patience - (time.monotonic() - begin)
        if left < 10:
            parts[name] = {"status": "skipped", "reason": "no time was left", "seconds": 0.0}
            continue
        parts[name] = run_part(name, options.dry, min(PARTS[name] * patience, left))
    print(table(parts))
    facts = {"dry": options.dry, "seconds": round(time.monotonic() - begin, 1), "parts": parts}
    try:
        from hf_reflora.report.environment import environment
    except ModuleNotFoundError as error:  # every part has been skipped for the same reason
        facts["environment"] = {"missing": str(error)}
    else:
        facts["environment"] = environment(ROOT)
    options.record.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return int(any(outcome["status"] == "failed" for outcome in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
