"""Facts of this machine and process that a number depends on, without secrets."""

import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


PACKAGES = {"torch", "transformers", "peft", "trl", "accelerate", "datasets", "huggingface_hub", "hf_reflora"}
SECRET_WORDS = ("hub_token", "api_key", "secret", "password")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def environment(repository: Path | None = None) -> dict[str, Any]:
    """Facts that a number depends on: command, git commit of `repository`, versions and hardware.

    What cannot be found out is left out. Tokens on the command line are replaced by "***". `repository` defaults to
    the folder of the running script, or the current one.
    """
    script = Path(sys.argv[0])
    is_script = script.suffix == ".py" and script.is_file() and "site-packages" not in script.parts  # or a notebook
    if repository is None:
        repository = script.resolve().parent if is_script else Path.cwd()
    facts = {
        "command": redacted(sys.argv) if is_script else None,
        "commit": _git(repository, "rev-parse", "HEAD"),
        "uncommitted_changes": None if (status := _git(repository, "status", "--porcelain")) is None else bool(status),
        "python": platform.python_version(),
        "versions": {d.name: d.version for d in metadata.distributions() if d.name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": usable_cores(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def redacted(arguments: list[str]) -> list[str]:
    """Command-line arguments without secrets: values of options named after tokens, keys or secrets, and hf_…"""
    shown, hide_next = [], False
    for argument in arguments:
        option, separator, value = argument.partition("=")
        secret_option = option.startswith("-") and _is_secret(option.lstrip("-"))
        if hide_next or (value or argument).startswith("hf_"):
            shown.append(f"{option}=***" if separator else "***")
        else:
            shown.append(f"{option}=***" if secret_option and separator else argument)
        hide_next = secret_option and not separator
    return shown


def without_secrets(value: Any) -> Any:
    """A copy of data for JSON: no Hub tokens, no values named after secrets, ~ for the home, "nan" for NaN."""
    if isinstance(value, dict):
        return {
            name: "***" if isinstance(entry, str) and _is_secret(str(name)) else without_secrets(entry)
            for name, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        home = str(Path.home())
        value = HUB_TOKEN.sub("hf_***", value)
        return re.sub(rf"(?<![\w/.-]){re.escape(home)}(?![\w.-])", "~", value) if len(home) > 1 else value
    return value


def _is_secret(name: str) -> bool:
    return name == "token" or any(word in name.lower() for word in SECRET_WORDS)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def peak_memory_gb() -> dict[str, float]:
    """Largest memory that this process has held so far, in 10⁹ bytes: of the host, and of each CUDA device it used."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    for i in range(torch.cuda.device_count()):
        peaks[f"cuda:{i}"] = torch.cuda.max_memory_allocated(i) / 1e9
    return {name: round(value, 3) for name, value in peaks.items()}


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes `record` to `path` whole or not at all."""
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` whole or not at all."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
