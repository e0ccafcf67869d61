"""RunRecord: the file format, older and newer versions of it, and how entries are set and merged."""

import json
from pathlib import Path

import pytest

from hf_reflora.report.record import RunRecord


RECORDS = sorted((Path(__file__).parents[2] / "benchmarks/records/smollm2-135m").glob("*.json"))
LEAST = {"method": "lora", "model": "org/base"}


def again(record: RunRecord) -> dict:
    """What is in the file that the record writes."""
    return json.loads(json.dumps(record.to_dict()))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_shipped_record_is_saved_as_it_was(path, tmp_path):
    """Four of them are older than the keys base_model, tags and runs."""
    RunRecord.load(path).save(tmp_path / "run_record.json")
    saved, original = (json.loads(p.read_text(encoding="utf-8")) for p in (tmp_path / "run_record.json", path))
    assert saved == original


def test_nulls_are_known_and_what_is_not_known_is_not_written():
    record = RunRecord.from_dict({**LEAST, "base_model": None, "base_revision": None, "data_seed": None})
    assert record.base_model is None
    assert record.knows("base_model")
    assert not record.knows("dataset_id")
    assert again(record) == {"schema": 2, **LEAST, "base_model": None, "base_revision": None, "data_seed": None}


@pytest.mark.parametrize(
    ("data", "base_model", "dataset_id"),
    [
        ({}, "org/base", None),
        ({"dataset": "org/data"}, "org/base", "org/data"),
        ({"dataset": "/data/rows", "model": "/data/base"}, None, None),
        ({"base_model": None, "dataset": "org/data", "dataset_id": None}, None, None),
        ({"base_model": "a/b", "dataset": "x", "dataset_id": "c/d"}, "a/b", "c/d"),
    ],
)
def test_older_records_have_ids_of_the_form_of_their_names(data, base_model, dataset_id):
    record = RunRecord.from_dict({**LEAST, **data})
    assert (record.base_model, record.dataset_id) == (base_model, dataset_id)
    assert again(record) == {"schema": 2, **LEAST, **data}


def test_older_records_have_the_tags_of_trl():
    assert RunRecord.from_dict(LEAST).tags == ["sft", "trl"]
    assert RunRecord.from_dict({**LEAST, "tags": []}).tags == []
    assert "tags" not in again(RunRecord.from_dict(LEAST))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "This is no run record: it has no method and no model"),
        ({"method": "lora"}, "it has no model"),
        ([1], "it has no method and no model"),
        ({**LEAST, "schema": 3}, "has version 3 of the format, and this version of hf_reflora knows 2. Update"),
    ],
)
def test_what_is_no_record_is_refused(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RunRecord.from_dict(data)
    (tmp_path / "run_record.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"run_record\.json: .*{message}"):
        RunRecord.load(tmp_path / "run_record.json")


def test_a_file_cut_short_is_refused_with_its_name(tmp_path):
    (tmp_path / "run_record.json").write_text('{"method": "lo')
    with pytest.raises(ValueError, match=r"run_record\.json: Unterminated string"):
        RunRecord.load(tmp_path / "run_record.json")


def test_update_merges_at_every_depth_and_replace_does_not():
    record = RunRecord(scores={"before": {"exact": 0.0}}, arguments={"a": 1, "b": {"c": 2}})
    record.update(scores={"before": {"f1": 0.5}, "rows": 3}, arguments={"b": {"d": 4}}, examples=[{"prompt": "p"}])
    assert record.scores == {"before": {"exact": 0.0, "f1": 0.5}, "rows": 3}
    assert record.arguments == {"a": 1, "b": {"c": 2, "d": 4}}
    assert record.examples == [{"prompt": "p"}]
    record.replace(arguments={"b": 5}, examples=[])
    assert (record.arguments, record.examples) == ({"b": 5}, [])


def test_fill_leaves_what_is_known():
    record = RunRecord.from_dict({**LEAST, "dataset_id": None, "train_rows": 3})
    record.fill(dataset_id="org/data", train_rows=4, dataset_split="train")
    assert (record.dataset_id, record.train_rows, record.dataset_split) == (None, 3, "train")


def test_keys_of_the_users_own_stay():
    record = RunRecord.from_dict({**LEAST, "mine": {"a": 1}})
    record.update(mine={"b": 2}, other=3)
    assert again(record) == {"schema": 2, **LEAST, "mine": {"a": 1, "b": 2}, "other": 3}
    assert record.knows("mine")


def test_a_resumed_run_continues_runs_scores_costs_and_examples():
    earlier = RunRecord.from_dict(
        {
            **LEAST,
            "seed": 1,
            "log": [{"step": 1}],
            "runs": [{"from_step": 0}],
            "scores": {"before": {"exact": 0.0, "loss": 2.0}, "after": {"loss": 1.0}},
            "seconds": {"train": 5.0},
            "examples": [{"prompt": "p"}],
            "card": {"tags": ["a"], "license": "mit"},
        }
    )
    record = RunRecord.from_dict({**LEAST, "seed": 2, "scores": {"before": {"loss": 3.0}}, "card": {"tags": ["b"]}})
    record.resume(earlier)
    assert (record.seed, record.log) == (2, [])
    assert record.runs == [{"from_step": 0}]
    assert record.scores == {"before": {"exact": 0.0, "loss": 3.0}, "after": {"loss": 1.0}}
    assert record.card == {"tags": ["b"], "license": "mit"}
    assert record.examples == [{"prompt": "p"}]


def test_losses_that_are_not_finite_are_numbers_again(tmp_path):
    log = [{"step": 1, "loss": float("inf")}, {"step": 1, "eval_loss": 1.0}, {"step": 2, "loss": 1.5}]
    RunRecord(method="lora", model="x", log=log).save(tmp_path / "run_record.json")
    assert RunRecord.load(tmp_path / "run_record.json").losses == [(1, float("inf")), (2, 1.5)]
