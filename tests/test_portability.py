"""Nothing in the package needs Unix: its modules are imported, and its paths are made, as on Windows.

`make lint` adds a type check for Windows, which finds functions of `os` and other modules that exist on Unix only.
"""

import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest

import hf_reflora
from hf_reflora.report import environment
from hf_reflora.report.environment import peak_memory_gb, without_secrets, write_text


IMPORT_ALL = """
import builtins, importlib, pkgutil, sys

UNIX = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "crypt", "spwd", "nis"}
import_module, refused = builtins.__import__, []

def without_unix(name, globals=None, *args, **kwargs):
    # The standard library and others may import them: they check where they are.
    if name.partition(".")[0] in UNIX and (globals or {}).get("__name__", "").startswith("hf_reflora"):
        refused.append(name)
        raise ModuleNotFoundError(f"No module named {name!r}, as on Windows", name=name)
    return import_module(name, globals, *args, **kwargs)

builtins.__import__ = without_unix
import hf_reflora
for module in pkgutil.walk_packages(hf_reflora.__path__, "hf_reflora."):
    # The first runs the command, the others need axolotl and lm-eval, which the tests' environment does not have.
    if module.name not in ("hf_reflora.__main__", "hf_reflora.axolotl", "hf_reflora.recipes.benchmarks"):
        importlib.import_module(module.name)
        print(module.name)
from hf_reflora.report.environment import environment, peak_memory_gb
environment()
peak_memory_gb()
print("refused:", refused)
"""


def test_every_module_is_imported_without_the_modules_that_only_unix_has():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *modules, refused = done.stdout.splitlines()
    package = Path(hf_reflora.__path__[0])
    left_out = {package / "axolotl.py", package / "recipes" / "benchmarks.py", *package.rglob("__*__.py")}
    files = set(package.rglob("*.py")) - left_out
    assert len(modules) >= len(files)
    assert refused == "refused: ['resource']"  # asked for by peak_memory_gb, which does without


def test_peak_memory_is_windows_own_peak_or_left_out(monkeypatch):
    class Process:
        def memory_info(self):
            return type("pmem", (), {"rss": 1_000_000_000, "peak_wset": 2_000_000_000})

    monkeypatch.setattr(environment.psutil, "Process", Process)
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_memory_gb()["host"] == 2.0
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert "host" not in peak_memory_gb()  # the size now would be no peak


def test_the_name_of_the_processor_without_proc(monkeypatch):
    monkeypatch.setattr(environment, "Path", lambda _: Path("no such file"))
    name = environment._cpu.__wrapped__()
    assert name == environment.cpuinfo.get_cpu_info()["brand_raw"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"C:\Users\me\runs\a", r"~\runs\a"),
        ("C:/Users/me/runs/a", "~/runs/a"),
        (r"C:\Users\me", "~"),
        (r"C:\Users\me2\runs", r"C:\Users\me2\runs"),
        (r"D:\C:\Users\me.txt", r"D:\C:\Users\me.txt"),
    ],
)
def test_the_home_folder_of_windows_is_hidden(monkeypatch, text, shown):
    monkeypatch.setattr(environment.Path, "home", lambda: PureWindowsPath(r"C:\Users\me"))
    assert without_secrets(text) == shown


def test_files_have_the_same_bytes_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("os.linesep", "\r\n")
    write_text(tmp_path / "README.md", "a\nb\n")
    assert (tmp_path / "README.md").read_bytes() == b"a\nb\n"


def test_a_file_is_closed_before_it_is_renamed(tmp_path, monkeypatch):
    (tmp_path / "record.json").write_text("old", encoding="utf-8")
    replace = Path.replace

    def as_on_windows(self, target):
        opened = {Path(f"/proc/self/fd/{fd.name}").resolve() for fd in Path("/proc/self/fd").iterdir()}
        if self.resolve() in opened:
            raise PermissionError("[WinError 32] The process cannot access the file because it is being used")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", as_on_windows)
    write_text(tmp_path / "record.json", "new")
    assert (tmp_path / "record.json").read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
