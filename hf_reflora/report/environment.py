"""Facts about this machine and process that a measured number depends on, without secrets."""

import functools
import json
import math
import platform
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import cpuinfo
import psutil
import torch

from .json_values import jsonable


PACKAGES = {"torch", "transformers", "peft", "trl", "accelerate", "datasets", "huggingface_hub", "hf_reflora"}
SECRET_WORDS = ("hub_token", "api_key", "secret", "password")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def environment(repository: Path | None = None) -> dict[str, Any]:
    """Facts that a measured number depends on: the command, the git commit, library versions and the hardware.

    A fact that cannot be determined is left out. Tokens on the command line are replaced by "***".

    Args:
        repository: A folder inside the git repository whose commit is recorded. Default: the folder of the running
            script, or the current folder in a notebook or an installed command.
    """
    script = Path(sys.argv[0])
    is_script = script.suffix == ".py" and script.is_file() and "site-packages" not in script.parts
    if repository is None:
        repository = script.resolve().parent if is_script else Path.cwd()
    facts = {
        "command": redacted([script.as_posix(), *sys.argv[1:]]) if is_script else None,
        "commit": _git(repository, "rev-parse", "HEAD"),
        "repository": public_address(_git(repository, "config", "--get", "remote.origin.url")),
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
    """The command-line arguments with "***" for each value that starts with hf_ or whose option names a secret."""
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
    """A copy of `value` that can be published as JSON.

    Hub tokens and the values of keys that name a secret are replaced by asterisks, the home folder by "~", and
    numbers that are not finite, which JSON does not have, by "nan" and "inf". Other values that JSON does not know
    become text, see `jsonable`.
    """
    # Made plain first: the text of an object may have a token in it.
    return _without_secrets(jsonable(value))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: "***" if isinstance(entry, str) and _is_secret(name) else _without_secrets(entry)
            for name, entry in value.items()
        }
    if isinstance(value, list):
        return [_without_secrets(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return _without_home(HUB_TOKEN.sub("hf_***", value), Path.home())
    return value


def _without_home(text: str, home: PurePath) -> str:
    if home == home.parent:  # the root: a service account's home, which tells nothing
        return text
    # On Windows people and libraries write the same folder with backslashes and with slashes.
    for written in {str(home), home.as_posix()}:
        text = re.sub(rf"(?<![\w/.-]){re.escape(written)}(?![\w.-])", "~", text)
    return text


def _is_secret(name: str) -> bool:
    return name == "token" or any(word in name.lower() for word in SECRET_WORDS)


def usable_cores() -> int:
    """The number of cores that this process may run on; a container or a batch system may allow fewer than exist."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # macOS has no such limit and psutil no such method there
        return len(process.cpu_affinity())
    return psutil.cpu_count() or 1


def peak_memory_gb() -> dict[str, float]:
    """The most memory that this process has used so far, in 10⁹ bytes: "host" and "cuda:N" for each device."""
    peaks = {"host": peak} if (peak := _peak_host_bytes()) is not None else {}
    for i in range(torch.cuda.device_count()):
        peaks[f"cuda:{i}"] = torch.cuda.max_memory_allocated(i)
    return {name: round(bytes_ / 1e9, 3) for name, bytes_ in peaks.items()}


def _peak_host_bytes() -> int | None:
    """The largest resident set of this process so far; None where the system does not say."""
    # psutil reports the current size everywhere and the peak only on Windows; Unix reports it through `resource`,
    # a module that Windows does not have.
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux and the BSDs count KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes `record` to `path` as JSON, atomically: see `write_text`."""
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically: a reader, or a killed process, never leaves or sees half of it."""
    # newline: Windows would write \r\n, and files on the Hub are compared byte by byte.
    file = tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="\n", dir=path.parent, prefix=".", delete=False)
    unfinished = Path(file.name)
    try:
        with file:  # closed before it is renamed: Windows does not rename open files
            file.write(text)
        unfinished.chmod(0o644)  # a temporary file is readable by its owner only
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink()
        raise


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def public_address(remote: str | None) -> str | None:
    """The https address of git's remote, without user names and tokens; None for one on this machine or network."""
    if remote is None:
        return None
    # https://USER:TOKEN@HOST/PATH, ssh://git@HOST:PORT/PATH, or git@HOST:PATH as scp writes it
    address = re.fullmatch(r"(?:(?:https|ssh|git)://(?:[^@/]*@)?([\w.-]+)(?::\d+)?/|[\w.-]+@([\w.-]+):)(\S+)", remote)
    if address is None:
        return None
    host, path = address[1] or address[2], address[3].removesuffix("/").removesuffix(".git")
    return f"https://{host}/{path}" if "." in host and not re.fullmatch(r"[\d.]+", host) else None


@functools.cache  # py-cpuinfo takes more than a second
def _cpu() -> str | None:
    """The processor's name, such as "Intel(R) Xeon(R) Processor"."""
    # Linux on x86 states the name in a file that is read in no time. ARM's /proc/cpuinfo has no such line, and other
    # systems have no such file: there py-cpuinfo asks the system's own tools.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    return name or cpuinfo.get_cpu_info().get("brand_raw") or platform.processor() or None
