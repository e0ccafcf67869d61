"""The Space as `hf-reflora space` fills it, in a virtual environment of its own requirements: stock PEFT only."""

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest
from space_server import Space, models

from hf_reflora.hub.space import FILES, fill


gradio_client = pytest.importorskip("gradio_client")
ROOT = Path(__file__).parents[2]
ZERO_GPU = ROOT / "tests" / "support" / "space_zero_gpu.py"
REQUESTS = [("Hello", name, "", 6, temperature, 1, 3) for name in ("first", "second") for temperature in (0, 1)]


@pytest.mark.release
def test_it_starts_and_answers_also_on_zero_gpu(tmp_path):
    base, adapters = models(tmp_path)
    fill(tmp_path / "space", base=str(base), adapters=[str(path) for path in reversed(adapters.values())])
    assert {path.name for path in (tmp_path / "space").iterdir()} == set(FILES)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", "gradio", "spaces"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*command, "-r", tmp_path / "space" / "requirements.txt"], env=clean, check=True, timeout=500)
    absent = subprocess.run([python, "-c", "import hf_reflora"], env=clean, capture_output=True, cwd=tmp_path)
    assert b"No module named 'hf_reflora'" in absent.stderr

    with Space(tmp_path, app=tmp_path / "space" / "app.py", python=str(python), PYTHONPATH="") as space:
        client = gradio_client.Client(space.url, verbose=False)
        answers = [list(client.predict(*request, api_name="/compare")[:2]) for request in REQUESTS]
    assert len({tuple(sides) for sides in answers}) >= 3
    assert answers[0][0] != answers[0][1]

    start = {"MAX_NEW_TOKENS": "4000", "TEMPERATURE": "0.5", "TOP_P": "0.9", "SEED": "11"}
    start["SYSTEM_PROMPT"] = "As a pirate."
    command = [python, ZERO_GPU, tmp_path / "space", json.dumps(REQUESTS)]
    done = subprocess.run(command, env=clean | start, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device"] == "cuda:0"  # where it starts there is none
    assert found["answers"] == answers
    assert [path for path, _ in found["asked"]] == [
        "/startup-report",
        *("/schedule", "/allow", "/release"),  # stopped, and the worker is used again
        *["/schedule", "/release"] * len(REQUESTS),
    ]
    assert [query["durationSeconds"] for path, query in found["asked"] if path == "/schedule"] == ["120", *["15"] * 4]
    assert {query["fail"] for path, query in found["asked"] if path == "/release"} == {"false"}
    assert "tokens long; the model takes 4095. Shorten it." in found["refused"]
    assert found["asked_for_the_refused"] == []
    page = found["page"]
    assert page["Adapter"] == "second"  # the first one of the front matter
    assert found["system_prompts"] == dict.fromkeys(["second", "first"], "As a pirate.")  # first's record has one, too
    assert page["Longest answer, in tokens"] == 128
    assert page["Temperature (0: likeliest token)"] == 0.5
    assert page["Top-p"] == 0.9
    assert page["Seed (the same luck for both)"] == 11
