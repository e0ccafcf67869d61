"""How the methods of a sweep are compared: the best settings, their noise, and what the user is warned of."""

from dataclasses import replace

import pytest

from hf_reflora.sweep.outcomes import Outcome, best_of
from hf_reflora.sweep.plan import Sweep
from hf_reflora.sweep.summary import best_command, best_settings, mean_and_error, table, warnings


def outcome(method, rate, seed, loss, status="finished"):
    scores = {"loss": loss, "exact": 1 - loss} if loss is not None else {}
    choice = {"learning_rate": rate, "seed": seed}
    return Outcome(f"{method}{rate}{seed}", method, choice, status, "", 90.0, "loss", loss, scores)


@pytest.fixture
def sweep():
    grid = {"learning_rate": [1e-3, 2e-3, 4e-3], "seed": [0, 1]}
    methods = {"LoRA": {"method": "lora"}, "RefLoRA": {"method": "reflora", "reflora_warmup_steps": 10}}
    options = {"eval_strategy": "epoch", "system_prompt": "Answer with {} and 'quotes'."}
    return Sweep("sft", "smollm2-135m/lora", options=options, grid=grid, methods=methods)


def test_each_method_at_its_own_best(sweep):
    outcomes = [outcome("LoRA", 1e-3, 0, 0.5), outcome("LoRA", 1e-3, 1, 0.3), outcome("LoRA", 2e-3, 0, 0.45)]
    outcomes += [outcome("LoRA", 2e-3, 1, 0.55), outcome("RefLoRA", 4e-3, 0, 0.2)]
    outcomes += [outcome("RefLoRA", 2e-3, 0, None, "diverged"), outcome("RefLoRA", 1e-3, 0, None, "failed")]
    first, second = best_settings(sweep, outcomes)
    assert (first.method, first.setting) == ("RefLoRA", {"learning_rate": 4e-3})
    assert (second.method, second.setting) == ("LoRA", {"learning_rate": 1e-3})
    lines = table(sweep, outcomes).splitlines()
    assert lines[2] == "| RefLoRA | learning_rate 0.004 | 1 | 0.2 | 0.8 | 3 | 1 | 1 | 1.5 |"
    assert lines[3] == "| LoRA | learning_rate 0.001 | 2 | 0.40 ± 0.10 | 0.60 ± 0.10 | 4 | 0 | 0 | 1.5 |"
    assert [warning.split(",")[0] for warning in warnings(sweep, outcomes)] == [
        "The best learning_rate of LoRA",
        "The best learning_rate of RefLoRA",
    ]
    assert "0.004, is the largest that was tried" in list(warnings(sweep, outcomes))[1]


def test_a_setting_that_diverged_with_one_seed_is_not_the_best(sweep):
    outcomes = [outcome("LoRA", 4e-3, 0, 0.1), outcome("LoRA", 4e-3, 1, None, "diverged"), outcome("LoRA", 2e-3, 0, 1)]
    best = best_of(sweep, outcomes)
    assert best.setting == {"learning_rate": 2e-3}
    assert list(warnings(sweep, outcomes)) == ["RefLoRA has no setting that finished."]


def test_fresh_seeds_count_once_there_are_all(sweep):
    """Otherwise one method would be compared by other seeds than another."""
    sweep = replace(sweep, fresh_seeds=[5, 6])
    outcomes = [outcome("LoRA", 1e-3, 0, 0.5), outcome("LoRA", 1e-3, 5, 0.1)]
    assert [o.choice["seed"] for o in best_of(sweep, outcomes).outcomes] == [0]
    best = best_of(sweep, [*outcomes, outcome("LoRA", 1e-3, 6, 0.2)])
    assert [o.choice["seed"] for o in best.outcomes] == [5, 6]


def test_a_score_is_to_be_large(sweep):
    sweep = replace(sweep, metric="exact")
    outcomes = [
        replace(o, value=o.scores["exact"]) for o in (outcome("LoRA", 1e-3, 0, 0.5), outcome("LoRA", 2e-3, 0, 0.2))
    ]
    assert best_of(sweep, outcomes).setting == {"learning_rate": 2e-3}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.05213], "0.05213"),
        ([0.0521, 0.0523], "0.05220 ± 0.00010"),
        ([1.0, 1.0], "1.0000 ± 0.0000"),
        ([100.0, 200.0], "150 ± 50"),
    ],
)
def test_two_digits_of_the_error(values, text):
    assert mean_and_error(values) == text


def test_the_line_to_copy(sweep):
    (best,) = best_settings(sweep, [outcome("RefLoRA", 2e-3, 0, 0.1)])
    assert best_command(sweep, best) == (
        "hf-reflora sft --config smollm2-135m/lora --eval_strategy epoch --system_prompt 'Answer with {} and "
        "'\"'\"'quotes'\"'\"'.' --method reflora --reflora_warmup_steps 10 --learning_rate 0.002"
    )
