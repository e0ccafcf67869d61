"""Weights that are broken are refused before a push, each with a sentence that says how to mend it."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from hf_reflora.hub.staging import read_record, stage
from hf_reflora.report.weights import check_weights


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def folder(tmp_path):
    tiny.lora(tiny.llama()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder, function):
    path = folder / "adapter_model.safetensors"
    save_file(function(load_file(path)), path)


def renamed(tensors):
    return {name.replace("lora_A.", "lora_A.default."): tensor for name, tensor in tensors.items()}


def with_value(value):
    def function(tensors):
        next(iter(tensors.values()))[0, 0] = value
        return tensors

    return function


BROKEN = {
    "nan": (with_value(float("nan")), "values that are not finite, in base_model"),
    "inf": (with_value(float("inf")), "The training diverged"),
    "no B": (
        lambda tensors: {n: t for n, t in tensors.items() if "lora_B" not in n},
        "only one factor of a LoRA pair",
    ),
    "one A missing": (lambda tensors: dict(list(tensors.items())[1:]), "only one factor of a LoRA pair"),
    "names": (renamed, "adapter's name in its keys"),
    "empty": (lambda tensors: {}, "has no tensors"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_tensors_that_are_wrong(folder, tmp_path, kind):
    function, message = BROKEN[kind]
    change(folder, function)
    with pytest.raises(ValueError, match=message):
        check_weights(folder)
    with pytest.raises(ValueError, match=message):
        stage(folder, tmp_path / "out", record=read_record(folder), checkpoints={})


def test_a_bias_of_b_is_no_half_of_a_pair(tmp_path):
    tiny.lora(tiny.gpt2(), target_modules=["c_attn"], lora_bias=True).save_pretrained(tmp_path)
    assert any(name.endswith("lora_B.bias") for name in load_file(tmp_path / "adapter_model.safetensors"))
    check_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"\(0 bytes\) cannot be read"), (POINTER, "git lfs pull"), (b"x" * 100, "cannot be read as safetensors")],
)
def test_files_that_are_no_weights(folder, content, message):
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_weights(folder)


def test_a_file_that_was_cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        check_weights(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_every_dtype_can_be_read(folder, dtype):
    change(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    check_weights(folder)
