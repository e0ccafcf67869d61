"""The Space as `hf-reflora space` fills it, in a virtual environment of its own requirements: stock PEFT only."""

import os
import subprocess
import venv
from pathlib import Path

import pytest
from space_server import Space

from hf_reflora.space import FILES, fill


gradio_client = pytest.importorskip("gradio_client")
ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_it_starts_and_answers(tmp_path):
    fill(tmp_path / "space", base="org/base", adapters=["org/adapter"])
    assert {path.name for path in (tmp_path / "space").iterdir()} == set(FILES)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", "gradio"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*command, "-r", tmp_path / "space" / "requirements.txt"], env=clean, check=True, timeout=500)
    absent = subprocess.run([python, "-c", "import hf_reflora"], env=clean, capture_output=True, cwd=tmp_path)
    assert b"No module named 'hf_reflora'" in absent.stderr
    with Space(tmp_path, app=tmp_path / "space" / "app.py", python=str(python), PYTHONPATH="") as space:
        base, adapted, *_ = gradio_client.Client(space.url, verbose=False).predict(
            "Hello", "first", "", 5, api_name="/compare"
        )
    assert base != adapted
