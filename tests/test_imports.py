"""What an import or a command loads: `--help` answers at once, and nobody pays for a library that they do not use."""

import subprocess
import sys

import pytest


LARGE = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "datasets",
    "trl",
    "matplotlib",
    "safetensors",
}


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `code`."""
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    code += "print('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("loaded: ")[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import hf_reflora",
        "from hf_reflora.cli import main; main(['--help'])",
        "from hf_reflora.cli import main; main(['--version'])",
        "from hf_reflora.cli import main; main(['push', '--help'])",
        "import runpy; sys.argv[1:] = ['--version']; runpy.run_module('hf_reflora', run_name='__main__')",
    ],
)
def test_nothing_large_is_loaded(code):
    assert loaded_by(code) & LARGE == set()


def test_the_callback_needs_neither_trl_nor_matplotlib():
    loaded = loaded_by("from hf_reflora import RefLoraCallback")
    assert "hf_reflora.reflora.callback" in loaded
    assert loaded & {"trl", "matplotlib"} == set()


def test_the_optimizer_needs_no_trainer():
    loaded = loaded_by("from hf_reflora import create_reflora_optimizer")
    assert "hf_reflora.reflora.optimizer" in loaded
    assert loaded & {"trl", "matplotlib", "transformers.trainer"} == set()
