"""The Space's configuration, and its function as ZeroGPU calls it, with the app in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from space_server import models

from hf_reflora.space import fill


FORKED = Path(__file__).parent / "space_forked.py"
VARIABLES = ("BASE_MODEL", "ADAPTERS", "SYSTEM_PROMPT", "MAX_NEW_TOKENS", "TEMPERATURE", "TOP_P", "SEED")


def run(folder, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, FORKED, folder]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Space that says its models in the front matter alone."""
    pytest.importorskip("gradio")
    root = tmp_path_factory.mktemp("app")
    base, adapters = models(root)
    fill(root / "space", base=str(base), adapters=[str(path) for path in reversed(adapters.values())])
    return root / "space"


def test_a_forked_worker_says_the_same(folder):
    done = run(folder, MAX_NEW_TOKENS="7", TEMPERATURE="0.5", TOP_P="0.9", SEED="11", SYSTEM_PROMPT="As a pirate.")
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["stopped"] == 2
    assert len(found["here"]) == 4
    assert found["there"] == found["here"]
    assert len({tuple(sides) for sides in found["here"]}) >= 3
    page = found["page"]
    assert page["Adapter"] == "second"  # the first of the front matter's
    assert page["System prompt"] == "As a pirate."
    assert page["Longest answer, in tokens"] == 7
    assert page["Temperature (0: likeliest token)"] == 0.5
    assert page["Top-p"] == 0.9
    assert page["Seed (the same luck for both)"] == 11


@pytest.fixture(scope="module")
def app(folder):
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        patch.syspath_prepend(folder)
        import app

        yield app


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TEMPERATURE": "hot"}, "could not convert string to float: 'hot'"),
        ({"TOP_P": "0"}, "top-p must be above 0 and at most 1, not 0.0"),
        ({"MAX_NEW_TOKENS": "1e9"}, "invalid literal for int"),
    ],
)
def test_wrong_settings_end_the_start(app, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        app.configured_settings()


def test_variables_go_before_the_front_matter(app, monkeypatch):
    assert list(app.configured()[1]) == ["second", "first"]
    monkeypatch.setenv("ADAPTERS", "org/x, mine = org/y")
    assert app.configured()[1] == {"x": "org/x", "mine": "org/y"}
    monkeypatch.setenv("BASE_MODEL", "org/base")
    assert app.configured()[0] == "org/base"
    monkeypatch.setenv("ADAPTERS", "a/x,b/x")
    with pytest.raises(ValueError, match="Two adapters are called x"):
        app.configured()


def test_without_models_the_start_says_what_to_set(app, monkeypatch, tmp_path):
    fill(tmp_path / "space", base="", adapters=[])
    monkeypatch.setattr(app, "__file__", str(tmp_path / "space" / "app.py"))
    with pytest.raises(ValueError, match="Set BASE_MODEL to the base model and ADAPTERS to its adapters"):
        app.configured()
