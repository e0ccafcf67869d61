"""Numbers of a record that are missing, not finite, huge or tiny: the card and the plot survive and say so."""

import json
import math

import pytest
import yaml
from matplotlib.axes import Axes

from hf_reflora.report.card import render
from hf_reflora.report.numbers import alike, as_number, change, counted, rounded
from hf_reflora.report.plot import plot
from hf_reflora.report.record import RunRecord


ODD = [math.nan, math.inf, -math.inf, None, "nan", "inf", "-inf", 1e300, -1e300, 10**400, 0, -3.5, 1e-12, "many", []]


def record(value) -> RunRecord:
    """A record in which every number is `value`."""
    numbers = ("seed", "data_seed", "train_rows", "step", "tokens", "trainable_parameters", "processes", "num_labels")
    names = ("exact", "loss")
    return RunRecord.from_dict(
        {
            **{"method": "lora", "model": "org/base", "base_model": "org/base", "dataset_id": "org/data"},
            **dict.fromkeys(numbers, value),
            "scores": {"rows": value, "before": dict.fromkeys(names, value), "after": dict.fromkeys(names, value)},
            "log": [
                {"step": 1, "loss": value, "eval_loss": value},
                {"step": value, "loss": 1.5},
                {"step": 3, "loss": 1},
            ],
            "diagnostics": {"layers": value, "ranks": [], "balance_gap": value, "norm_A": value},
            "seconds": {"train": value, "total": value},
            "peak_memory_gb": {"host": value},
            "arguments": {"learning_rate": value, "lora_r": value},
            "peft": {"task_type": "CAUSAL_LM", "r": value},
            "runs": [{"from_step": value, "to_step": value, "started": "then"}] * 2,
            "environment": {"command": ["train.py"], "cores": value},
        }
    )


@pytest.mark.parametrize("value", ODD, ids=str)
def test_card_and_plot_survive_every_number(tmp_path, value):
    text = render(record(value), plot="training.png")
    data = yaml.safe_load(text.split("---\n")[1])
    json.dumps(data, allow_nan=False)  # the Hub reads it as JSON, which has no NaN
    assert len(text) < 6000
    assert plot(record(value), tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_correlation_of_constant_predictions_is_shown_as_it_came_out():
    scores = {"rows": 0, "before": {"matthews": 0.1, "f1": None}, "after": {"matthews": "nan", "f1": 0.5}}
    text = render(RunRecord(method="lora", model="x", scores=scores))
    assert "| matthews | 0.100 | nan | – |" in text
    assert "f1" not in text
    [model] = yaml.safe_load(text.split("---\n")[1])["model-index"]
    assert [metric["name"] for result in model["results"] for metric in result["metrics"]] == ["matthews (base model)"]


def test_losses_that_are_not_finite_are_counted():
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": "inf"}]
    text = render(RunRecord(method="lora", model="x", log=log))
    assert "- 2 of the 3 logged training losses are not finite." in text
    assert "not finite" not in render(RunRecord(method="lora", model="x", log=log[:1]))


def test_small_scores_have_enough_digits():
    scores = {"before": {"mse": 0.0004, "exact": 0.25}, "after": {"mse": 0.0001, "exact": 0.5}}
    text = render(RunRecord(method="lora", model="x", scores=scores))
    assert "| mse | 0.0004 | 0.0001 | -0.0003 |" in text
    assert "| exact | 0.250 | 0.500 | +0.250 |" in text


@pytest.mark.parametrize(
    ("losses", "limit"),
    [([2.0, 1.0], 0), ([0.1, -0.2, -0.5], None), (["nan", 1.0], 0), (["nan"], None), ([1e300], None)],
)
def test_the_plot_shows_negative_losses(tmp_path, monkeypatch, losses, limit):
    limits, texts = [], []
    set_limits = Axes.set_ylim
    monkeypatch.setattr(Axes, "set_ylim", lambda axes, *a, **k: limits.append(k) or set_limits(axes, *a, **k))
    write = Axes.text
    monkeypatch.setattr(Axes, "text", lambda axes, x, y, s, **k: texts.append(s) or write(axes, x, y, s, **k))
    log = [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)]
    assert plot(RunRecord(method="lora", model="x", log=log), tmp_path / "x.png")
    assert [k for k in limits if "bottom" in k] == ([] if limit is None else [{"bottom": limit}])
    drawn = [loss for loss in losses if loss != "nan" and abs(loss) < 1e30]
    broken = len(losses) - len(drawn)
    assert texts == ([f"{broken} of {len(losses)} losses cannot be drawn"] if broken else [])


def test_evaluations_by_step_are_in_the_card():
    log = [
        *({"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 1.75}, {"step": 4, "loss": 1.0}),
        *({"step": 4, "eval_loss": "nan"}, {"step": 4, "train_loss": 1.5}),
    ]
    text = render(RunRecord(method="lora", model="x", log=log, arguments={"learning_rate": 0.1}))
    assert (
        "| step | training loss | evaluation loss |\n| ---: | ---: | ---: |\n| 2 | 2 | 1.75 |\n| 4 | 1 | nan |\n"
        in text
    )


def test_numbers_as_text():
    assert alike([0.5, 0.25]) == ["0.500", "0.250"]
    assert alike([0.0, 0.00002]) == ["0.00000", "0.00002"]
    assert alike([1e-12, 1e300]) == ["1e-12", "1e+300"]
    assert alike([math.nan, math.inf]) == ["nan", "inf"]
    assert alike([]) == []
    assert [as_number(value) for value in ("3", None, [], 10**400, -(10**400))] == [
        3.0,
        None,
        None,
        math.inf,
        -math.inf,
    ]
    assert [counted(value) for value in (1234, 1e6, "nan", None, 0.5)] == ["1,234", "1,000,000", "nan", "None", "0.5"]
    assert [rounded(value) for value in (0.12345, None, "nan")] == ["0.123", None, "nan"]
    assert [change(1.0, 3.0), change(math.inf, 1.0), change(math.nan, 1.0)] == [2.0, None, None]
