"""What JSON does not know becomes text that a person can read."""

import dataclasses
import enum
import functools
import json
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BitsAndBytesConfig
from transformers.trainer_utils import IntervalStrategy

from hf_reflora.report.environment import without_secrets
from hf_reflora.report.json_values import LONGEST, jsonable
from hf_reflora.report.record import RECORD_NAME, RunRecord


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Options:
    rank: int = 8
    path: Path | None = None


def a_function():
    """Named below."""


QUANTIZED = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
VALUES = [
    (torch.bfloat16, "bfloat16"),
    (torch.device("cuda", 1), "cuda:1"),
    (IntervalStrategy.STEPS, "steps"),
    (Colour.RED, 1),
    (a_function, f"{__name__}.a_function"),
    (functools.partial(a_function), "functools.partial"),
    (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
    (np.float32(0.5), 0.5),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (torch.tensor(2.5), 2.5),
    (torch.zeros(2, 3), "Tensor of shape (2, 3)"),
    (np.zeros((2, 3)), "ndarray of shape (2, 3)"),
    (Path("a") / "b", str(Path("a") / "b")),
    ((1, (2, 3)), [1, [2, 3]]),
    ({"b", "a"}, ["a", "b"]),
    (OrderedDict(a=1), {"a": 1}),
    ({1: 2, Colour.RED: 3, "a": torch.float16}, {"1": 3, "a": "float16"}),
    (Options(16, Path("x")), {"rank": 16, "path": "x"}),
    (object(), "builtins.object"),
    (threading.Lock(), "_thread.lock"),
    (complex(1, 2), "(1+2j)"),
    (None, None),
    (True, True),
]


# By number: the text of a function or an object has its address, and pytest-xdist needs the same names everywhere.
@pytest.mark.parametrize(("value", "expected"), VALUES, ids=range(len(VALUES)))
def test_values(value, expected):
    nested = {"a": [value, {"b": (value,)}]}
    result = jsonable(nested)
    assert result == {"a": [expected, {"b": [expected]}]}
    assert type(result["a"][0]) is type(expected)
    assert json.loads(json.dumps(result)) == result


def test_a_quantization_configuration_tells_what_it_sets():
    result = jsonable({"quantization_config": QUANTIZED})["quantization_config"]
    assert result["load_in_4bit"] is True
    assert result["bnb_4bit_compute_dtype"] == "bfloat16"
    assert json.loads(json.dumps(result)) == result


def test_a_long_text_is_cut():
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(50)])
    assert len(jsonable([model])[0]) <= LONGEST


def test_the_copy_is_deep():
    inner = [1]
    copied = jsonable({"a": inner})
    inner.append(2)
    assert copied == {"a": [1]}


def test_secrets_inside_objects_stay_out():
    class Token:
        def __str__(self):
            return f"token hf_{'aB3' * 11}x"

    assert without_secrets({"a": [Token()], "token": Token()}) == {"a": ["token hf_***"], "token": "***"}


def test_a_record_with_such_values_is_written_and_read(tmp_path):
    arguments = {"model_init_kwargs": {"dtype": torch.bfloat16, "quantization_config": QUANTIZED, "f": a_function}}
    record = RunRecord(method="lora", model="org/base", arguments=arguments, log=[{"step": 1, "loss": np.float32(2)}])
    record.save(tmp_path / RECORD_NAME)
    again = RunRecord.load(tmp_path / RECORD_NAME)
    assert again.arguments["model_init_kwargs"]["dtype"] == "bfloat16"
    assert again.losses == [(1, 2.0)]
