"""PEFT's own tests, those that it runs over each of its tuners, run over LoRA-SB.

They come only with PEFT's source distribution. This module imports them from there and puts LoRA-SB in the place of
PEFT's tuners in their `parametrize` marks. Tests without such a mark are about other tuners, and are left out.
"""

import importlib
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
from peft import PeftConfig
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hf_reflora import LoraSbConfig


VERSION = f"peft-{peft.__version__}"
SUITE = Path(os.environ.get("PEFT_TESTS") or Path(__file__).parents[2] / ".venv" / VERSION / "tests")
if not (SUITE / "testing_common.py").is_file():
    pytest.skip(
        f"PEFT's tests are not at {SUITE}: run `make test`, or unpack what `pip download --no-deps --no-binary peft "
        f"{VERSION.replace('-', '==')}` gives and set PEFT_TESTS to its folder tests",
        allow_module_level=True,
    )

# The suite's modules import one another relatively, but its folder is no package.
pytest.register_assert_rewrite("peft_suite")
package = ModuleType("peft_suite")
package.__path__ = [str(SUITE)]
sys.modules[package.__name__] = package
common, utils, config, custom, decoder = (
    importlib.import_module(f"{package.__name__}.{name}")
    for name in ("testing_common", "testing_utils", "test_config", "test_custom_models", "test_decoder_models")
)

# Models like those that the suite takes from the Hub, with random weights; written by the fixture `models`.
folder = tempfile.TemporaryDirectory(prefix="peft-suite-")
LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": 63, "eos_token_id": 63}
OPT = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "tiny-random-OPTForCausalLM": (
        OPTForCausalLM,
        OPTConfig(word_embed_proj_dim=32, max_position_embeddings=64, **OPT),
    ),
    "tiny-random-GPT2LMHeadModel": (GPT2LMHeadModel, GPT2Config(**GPT2)),
    "tiny-random-GPTJForCausalLM": (GPTJForCausalLM, GPTJConfig(rotary_dim=4, **GPT2)),
    "tiny-random-LlamaForCausalLM": (LlamaForCausalLM, LlamaConfig(**LLAMA)),
    "tiny-dummy-qwen2": (Qwen2ForCausalLM, Qwen2Config(**LLAMA)),
    "tiny-random-Gemma3ForCausalLM": (Gemma3ForCausalLM, Gemma3TextConfig(head_dim=8, **LLAMA)),
}
MODEL_IDS = [pytest.param(os.path.join(folder.name, name), id=name) for name in MODELS]
LORA_ADAPTER = os.path.join(folder.name, "lora")


def case(name: str, model: str = "MLP", init_weights: bool | str = True, **config_kwargs):
    return (name, model, LoraSbConfig, {"init_weights": init_weights, **config_kwargs})


CASES = [
    case("MLP 1", target_modules="lin0"),
    case("MLP 2", target_modules=["lin0"]),
    case("MLP 3", target_modules=["lin1"]),
    case("MLP 4", target_modules=["lin0", "lin1"]),
    case("MLP 5", target_modules=["lin0"], modules_to_save=["lin1"]),
    case("MLP 6 rank", target_modules=["lin0", "lin1"], r=4),
    case("MLP 7 rank 1", target_modules=["lin0", "lin1"], r=1),
    case("MLP 8 rank_pattern", target_modules=["lin0", "lin1"], r=8, rank_pattern={"lin1": 2}),
    case("MLP 9 scaling", target_modules=["lin0", "lin1"], scaling=2.0),
    case("MLP 10 dropout", target_modules=["lin0", "lin1"], lorasb_dropout=0.1),
    case("MLP 11 exclude_modules", target_modules="lin.*", exclude_modules=["lin1"]),
    case("Conv1D 1", "EmbConv1D", target_modules=["conv1d"]),
    case("Conv1D 2", "EmbConv1D", target_modules=["conv1d", "lin0"]),
    case("Conv1D 3", "EmbConv1D", target_modules=["conv1d"], modules_to_save=["lin0"]),
    case("MLP LoRA-XS 1", init_weights="lora_xs", target_modules=["lin0", "lin1"], r=2),
    case("MLP LoRA-XS 2", init_weights="lora_xs", target_modules=["lin0"], modules_to_save=["lin1"]),
    case("Conv1D LoRA-XS", "EmbConv1D", init_weights="lora_xs", target_modules=["conv1d", "lin0"]),
]
RANDOM = {"init_weights": False}
TWO_ADAPTERS = [
    (
        f"LoRA-SB {name}",
        "lorasb",
        LoraSbConfig,
        RANDOM | {"target_modules": first},
        RANDOM | {"target_modules": second},
    )
    for name, first, second in [
        ("same", ["lin0"], ["lin0"]),
        ("different", ["lin0"], ["lin1"]),
        ("overlapping", ["lin0"], ["lin0", "lin1"]),
    ]
]
MIXED_BATCHES = [
    (f"LoRA-SB {name}", LoraSbConfig(**RANDOM, **first), LoraSbConfig(**RANDOM, **second))
    for name, first, second in [
        ("ranks", {"target_modules": ["lin0"], "r": 4}, {"target_modules": ["lin0"], "r": 8}),
        ("different layers", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
        ("overlapping layers", {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}),
        ("modules to save", *[{"target_modules": ["lin0"], "modules_to_save": ["lin1"]}] * 2),
    ]
]
# The suite converts these to LoRAs of rank 4 (Qwen2) or 8, and requires that to be near.
DECODER = {"task_type": "CAUSAL_LM", "target_modules": None, "r": 4}
DECODER_CONFIGS = [
    (LoraSbConfig, {**DECODER, "init_weights": True, "lorasb_dropout": 0.05}),
    (LoraSbConfig, {**DECODER, "init_weights": "lora_xs"}),
]


@dataclass
class IdentityConfig(LoraSbConfig):
    """For tests that run a model, in training mode, with a configuration's defaults."""

    init_weights: bool | str = True


# The suite's lists of tuners and what takes their place.
TUNERS = [
    (custom.TEST_CASES, CASES),
    (custom.ALL_PEFT_CONFIG_CLASSES, [LoraSbConfig]),
    (custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES, TWO_ADAPTERS),
    (custom.MIXED_ADAPTER_TEST_CASES, MIXED_BATCHES),
    (decoder.ALL_CONFIGS, DECODER_CONFIGS),
    (config.ALL_CONFIG_CLASSES, [(LoraSbConfig, {})]),
    (config.LAYER_INDEXING_CONFIG_CLASSES, [(LoraSbConfig, {})]),
]
# Over a list of tuners, but it makes LoRAs whatever it is given.
IGNORES_ITS_TUNER = "test_add_weighted_adapter_cat_with_rank_pattern"


def is_config(value) -> bool:
    return isinstance(value, PeftConfig) or (isinstance(value, type) and issubclass(value, PeftConfig))


def replaced(mark):
    """`mark` over LoRA-SB, if it is over tuners: with one of the lists above, or with a list of its own."""
    if mark.name != "parametrize":
        return None
    names, values = mark.args
    for theirs, ours in TUNERS:
        if values is theirs:
            return pytest.mark.parametrize(names, ours, **mark.kwargs).mark
    values = list(values)
    if all(map(is_config, values)) and len({v if isinstance(v, type) else type(v) for v in values}) > 1:
        ours = IdentityConfig if isinstance(values[0], type) else LoraSbConfig(target_modules=["lin0"], **RANDOM)
        return pytest.mark.parametrize(names, [ours], **mark.kwargs).mark
    return None


def with_our_models(mark):
    if mark.name == "parametrize" and mark.args[1] is decoder.PEFT_DECODER_MODELS_TO_TEST:
        return pytest.mark.parametrize(mark.args[0], MODEL_IDS, **mark.kwargs).mark
    return mark


def suite_classes():
    """The suite's test classes, left with the tests that are over its tuners, now over LoRA-SB."""
    for module in (config, custom, decoder):
        for name, cls in list(vars(module).items()):
            if not name.startswith("Test") or getattr(cls, "__module__", None) != module.__name__:
                continue
            tests = [test for test in vars(cls) if test.startswith("test")]
            kept = 0
            for test in tests:
                function = vars(cls)[test]
                marks = getattr(function, "pytestmark", [])
                if test != IGNORES_ITS_TUNER and any(map(replaced, marks)):
                    function.pytestmark = [replaced(mark) or with_our_models(mark) for mark in marks]
                    kept += 1
                else:
                    delattr(cls, test)
            if kept:
                yield name, cls


classes = dict(suite_classes())
globals().update(classes)


@pytest.fixture(scope="module", autouse=True)
def models():
    for name, (cls, model_config) in MODELS.items():
        torch.manual_seed(0)
        cls(model_config).save_pretrained(os.path.join(folder.name, name))
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(LORA_ADAPTER)


@pytest.fixture(autouse=True)
def suite_knows_lora_sb(request, monkeypatch):
    """Where the suite has a closed list of the tuners that can do something, LoRA-SB belongs to it."""
    monkeypatch.setattr(common, "_skip_if_conv1d_not_supported", lambda *args: None)
    if "mixed_adapter_batches" in request.node.name:  # "!= LoraConfig" is how it spells that a tuner cannot
        monkeypatch.setattr(common, "LoraConfig", LoraSbConfig)
        monkeypatch.setattr(decoder, "LoraConfig", LoraSbConfig)
    # Meant for BEFT, it skips Llama and Gemma and changes GPT-J's target modules for all tuners.
    monkeypatch.setattr(decoder, "check_beft_config", lambda *args: None)
    # A LoRA checkpoint on the Hub, of which only the configuration is read.
    monkeypatch.setattr(config, "PEFT_MODELS_TO_TEST", [(LORA_ADAPTER, None)])
    # Otherwise the suite goes online the first time that it meets a model.
    monkeypatch.setattr(
        utils, "_HUB_MODEL_ACCESSES", dict.fromkeys([*(p.values[0] for p in MODEL_IDS), "MLP", "EmbConv1D"], 1)
    )


def test_the_suite_is_over_lora_sb(request):
    tests = [item for item in request.session.items if item.cls in classes.values()]
    for item in tests:
        tuners = [v if isinstance(v, type) else type(v) for v in item.callspec.params.values() if is_config(v)]
        assert tuners, item
        assert all(issubclass(tuner, LoraSbConfig) for tuner in tuners), item
    functions = [test for cls in classes.values() for test in vars(cls) if test.startswith("test")]
    assert len(functions) >= 120
