"""Benchmarks in a record, as the card, its front matter and the Hub's newer form show them. Needs no lm-eval."""

import math

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from hf_reflora.hub.eval_results import FILE, write_eval_results
from hf_reflora.report.benchmarks import benchmark_rows
from hf_reflora.report.card import render
from hf_reflora.report.front_matter import own_entries
from hf_reflora.report.record import RunRecord


ENTRY = {
    **{"task": "arc_easy", "metric": "acc", "filter": "none", "higher_is_better": True, "version": 1.0},
    **{"before": 0.61, "before_stderr": 0.03457, "after": 0.64, "after_stderr": 0.03402},
    **{"rows": 200, "total_rows": 2376, "fewshot": 0, "seed": 0, "lm_eval": "0.4.13"},
    **{"dataset": "allenai/ai2_arc", "dataset_config": "ARC-Easy"},
}
OTHER_METRIC = {**ENTRY, "metric": "acc_norm", "before": 0.5, "after": 0.5}
OWN = {
    **{**ENTRY, "task": "mine", "metric": "perplexity", "filter": "first|one", "higher_is_better": False},
    **{"before": 31.5, "before_stderr": None, "after": 12.25, "after_stderr": None, "total_rows": None},
    **{"dataset": None, "dataset_config": None, "fewshot": None},
}


def record(*entries):
    facts = {"method": "lora", "model": "org/base", "seed": 7, "tags": ["sft", "trl"]}
    return RunRecord.from_dict({**facts, "benchmarks": list(entries)})


def test_the_cards_table():
    card = render(record(ENTRY, OWN))
    assert "## What it changed\n\nBenchmarks of the base model and with the adapter, by [lm-eval](https://" in card
    assert "lm-evaluation-harness) 0.4.13 with the same prompts and seed; ± is the standard error:" in card
    assert "| arc\\_easy | acc | 0 | 200 of 2,376 | 0.610 ± 0.035 | 0.640 ± 0.034 | +0.030 |\n" in card
    assert "| mine | perplexity (first\\|one), lower is better | – | 200 | 31.500 | 12.250 | -19.250 |\n" in card
    assert (
        "The scores are of the benchmarks above; nothing else was measured. They are one run (seed 7), and another "
        "seed would give others." in card
    )


def test_the_model_index():
    card = render(record(ENTRY, OTHER_METRIC))
    found = ModelCard(card).data.eval_results
    assert [result.metric_value for result in found] == ["0.64 ± 0.034", "0.61 ± 0.035", "0.5 ± 0.034", "0.5 ± 0.035"]
    first = found[0]
    assert (first.dataset_type, first.dataset_config) == ("allenai/ai2_arc", "ARC-Easy")
    assert first.dataset_name == "arc_easy"
    assert first.metric_name == "arc_easy acc (with the adapter)"
    assert first.dataset_args == {"num_few_shot": 0, "rows": 200}
    assert first.source_name == "lm-eval 0.4.13"
    assert "model-index" not in own_entries(card).more  # ours, so that the next card does not have them twice


def test_a_score_that_is_not_finite_or_missing():
    broken = {**ENTRY, "after": "nan", "after_stderr": "nan"}
    [row] = benchmark_rows([broken, {**ENTRY, "before": None}])
    assert (row["before"], row["after"], row["change"]) == ("0.610 ± 0.035", "nan", "–")
    [result] = ModelCard(render(record(broken))).data.eval_results
    assert result.metric_name == "arc_easy acc (base model)"
    assert math.isnan(float(broken["after"]))


@pytest.mark.skipif(not hasattr(huggingface_hub, "EvalResultEntry"), reason="huggingface_hub does not know the form")
def test_the_hubs_newer_form_has_one_value_of_each_task(tmp_path):
    write_eval_results(tmp_path, record(ENTRY, OTHER_METRIC, OWN, {**ENTRY, "task": "x", "after": "inf"}))
    entries = yaml.safe_load((tmp_path / FILE).read_text(encoding="utf-8"))
    [entry] = huggingface_hub.parse_eval_result_entries(entries)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("allenai/ai2_arc", "arc_easy", 0.64)
    assert entry.notes == "acc: 0.640 ± 0.034, base model: 0.610 ± 0.035, 200 of 2,376 rows, 0-shot"
    assert (entry.source_name, entry.source_url.split("/")[-1]) == ("lm-eval 0.4.13", "lm-evaluation-harness")
    write_eval_results(tmp_path / "none", record(OWN))  # no data on the Hub: no file, nor its folder
    assert not (tmp_path / "none").exists()


def test_a_record_without_benchmarks_is_as_it_was(tmp_path):
    old = {"schema": 2, "method": "lora", "model": "org/base"}
    assert RunRecord.from_dict(old).benchmarks == []
    assert RunRecord.from_dict(old).to_dict() == old
    new = record(ENTRY)
    new.save(tmp_path / "run_record.json")
    assert RunRecord.load(tmp_path / "run_record.json").benchmarks == [ENTRY]
