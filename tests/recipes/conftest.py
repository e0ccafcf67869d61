"""What the tests of starts and optimizers share: a tiny model, rows to train it on, and the trainers of their runs."""

import json

import pytest
import tiny

from hf_reflora.recipes.run import Run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.save(folder / "model")
    rows = [{"prompt": f"{i} + {i} = ", "completion": f"{2 * i}", "class": i % 2} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture
def trainers(monkeypatch):
    """The trainers of the recipes that the test has run in this process, each with its trained model."""
    trainers, finish = [], Run._finish
    monkeypatch.setattr(Run, "_finish", lambda run, trainer, *a: trainers.append(trainer) or finish(run, trainer, *a))
    return trainers
