"""What a card says of adapters of every kind and task: kind, tags, classes and a snippet that runs."""

import json
import re

import pytest
import tiny
import torch
import transformers
import yaml
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BOFTConfig,
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from snippets import run_snippet
from transformers import BertConfig, T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification
from transformers import ViTImageProcessor as ImageProcessor

from hf_reflora.hub.staging import read_record
from hf_reflora.report.card import render
from hf_reflora.report.record import RunRecord
from hf_reflora.report.serving import vllm_rank


LAYERS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(kind: str, **config):
    torch.manual_seed(0)
    return getattr(transformers, kind)(BertConfig(vocab_size=260, max_position_embeddings=64, **BERT, **config))


def t5():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 260}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def vit(labels: int = 10):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16, num_labels=labels))


def card_of(folder) -> tuple[str, dict]:
    card = render(read_record(folder), repo_id=None)
    return card, yaml.safe_load(card.split("---\n")[1])


# The base model; PEFT's configuration; what the card says: sentence, pipeline tag, class of the base model
KINDS = {
    "LoRA": (tiny.llama, LoraConfig(task_type="CAUSAL_LM"), "LoRA", "text-generation", "AutoModelForCausalLM"),
    "DoRA": (
        *(tiny.llama, LoraConfig(task_type="CAUSAL_LM", use_dora=True)),
        *("DoRA", "text-generation", "AutoModelForCausalLM"),
    ),
    "IA3": (tiny.llama, IA3Config(task_type="CAUSAL_LM"), "IA³", "text-generation", "AutoModelForCausalLM"),
    "VeRA": (
        *(tiny.llama, VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4)),
        *("VeRA", "text-generation", "AutoModelForCausalLM"),
    ),
    "AdaLoRA": (
        *(tiny.llama, AdaLoraConfig(task_type="CAUSAL_LM", total_step=10)),
        *("AdaLoRA", "text-generation", "AutoModelForCausalLM"),
    ),
    "LoHa": (
        *(tiny.llama, LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])),
        *("LoHa", "text-generation", "AutoModelForCausalLM"),
    ),
    "LoKr": (
        *(tiny.llama, LoKrConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])),
        *("LoKr", "text-generation", "AutoModelForCausalLM"),
    ),
    "OFT": (
        *(tiny.llama, OFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], oft_block_size=4)),
        *("OFT", "text-generation", "AutoModelForCausalLM"),
    ),
    "prompt tuning": (
        *(tiny.llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        *("prompt tuning", "text-generation", "AutoModelForCausalLM"),
    ),
    "prefix tuning": (
        *(tiny.llama, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        *("prefix tuning", "text-generation", "AutoModelForCausalLM"),
    ),
    **{
        name: (tiny.llama, config, name, "text-generation", "AutoModelForCausalLM")
        for name, config in {
            "BOFT": BOFTConfig(**LAYERS, boft_block_size=4),
            "C3A": C3AConfig(**LAYERS, block_size=8),
            "FourierFT": FourierFTConfig(**LAYERS, n_frequency=10),
            "HRA": HRAConfig(**LAYERS, r=4),
            "LLaMA-Adapter": AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
            "LN tuning": LNTuningConfig(task_type="CAUSAL_LM"),
            "P-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
            "Poly": PolyConfig(**LAYERS, r=4, n_tasks=2),
            "RandLora": RandLoraConfig(**LAYERS, r=4),
            "VB-LoRA": VBLoRAConfig(**LAYERS, r=2, vector_length=16, num_vectors=32),
            "trainable tokens": TrainableTokensConfig(token_indices=[1, 2], task_type="CAUSAL_LM"),
        }.items()
    },
    "without a task type": (
        *(tiny.llama, LoraConfig(target_modules=["q_proj"])),
        *("LoRA", "text-generation", "LlamaForCausalLM"),
    ),
    "SEQ_CLS": (
        *(lambda: bert("BertForSequenceClassification", num_labels=3), LoraConfig(task_type="SEQ_CLS")),
        *("LoRA", "text-classification", "AutoModelForSequenceClassification"),
    ),
    "TOKEN_CLS": (
        *(lambda: bert("BertForTokenClassification", num_labels=5), LoraConfig(task_type="TOKEN_CLS")),
        *("LoRA", "token-classification", "AutoModelForTokenClassification"),
    ),
    "QUESTION_ANS": (
        *(lambda: bert("BertForQuestionAnswering"), LoraConfig(task_type="QUESTION_ANS")),
        *("LoRA", "question-answering", "AutoModelForQuestionAnswering"),
    ),
    "FEATURE_EXTRACTION": (
        *(lambda: bert("BertModel"), LoraConfig(task_type="FEATURE_EXTRACTION")),
        *("LoRA", "feature-extraction", "AutoModel"),
    ),
    "SEQ_2_SEQ_LM": (
        *(t5, LoraConfig(task_type="SEQ_2_SEQ_LM")),
        *("LoRA", "text-generation", "AutoModelForSeq2SeqLM"),
    ),
    "fill-mask": (
        *(lambda: bert("BertForMaskedLM"), LoraConfig(target_modules=["query"])),
        *("LoRA", "fill-mask", "BertForMaskedLM"),
    ),
    "image": (
        *(vit, LoraConfig(target_modules=["query", "q_proj"], modules_to_save=["classifier"])),
        *("LoRA", "image-classification", "ViTForImageClassification"),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_card_without_a_record_says_what_the_configuration_tells(tmp_path, monkeypatch, name):
    make, config, kind, pipeline_tag, model_class = KINDS[name]
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model = make()
    model.save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    if name == "image":
        from PIL import Image

        Image.new("RGB", (40, 40)).save(base / "image.jpg")
        ImageProcessor(size={"height": 32, "width": 32}).save_pretrained(base)
    peft = get_peft_model(model, config)
    peft.active_peft_config.base_model_name_or_path = "org/base"
    peft.save_pretrained(folder)
    card, data = card_of(folder)
    sentence = card.split("\n\n")[2]
    assert re.search(rf"\b{re.escape(kind)}( adapter|\.)", sentence)
    assert data["pipeline_tag"] == pipeline_tag
    assert ("lora" in data["tags"]) == (kind in ("LoRA", "DoRA"))
    assert f"import {model_class}" in card or f", {model_class}" in card
    assert ("vllm" in card) == (name in ("LoRA", "without a task type"))
    assert "None" not in card
    printed = run_snippet(card, base, folder, monkeypatch)
    # Nothing tells which words are masked, nor the number of the task.
    assert len(printed) == (name not in ("fill-mask", "Poly"))


@pytest.mark.parametrize(
    ("mapping", "tag", "text"),
    [
        (
            {"base_model_class": "UNet2DConditionModel", "parent_library": "diffusers.models.unets"},
            *(None, "where `model` is of the class `UNet2DConditionModel`."),
        ),
        ({"base_model_class": "MyModel", "parent_library": "__main__"}, None, "`model` is of the class `MyModel`."),
        (
            {"base_model_class": "WhisperForConditionalGeneration", "parent_library": "transformers.models.whisper"},
            *(None, "from transformers import WhisperForConditionalGeneration\n"),
        ),
        (None, None, "PEFT loads it onto the base model, `PeftModel.from_pretrained(model, "),
    ],
)
def test_what_the_configuration_does_not_tell_is_left_out(mapping, tag, text):
    record = RunRecord(method="lora", model="org/base", base_model="org/base", peft={"auto_mapping": mapping, "r": 4})
    card = render(record)
    data = yaml.safe_load(card.split("---\n")[1])
    assert data.get("pipeline_tag") == tag
    assert text in card
    for absent in ("AutoModelForCausalLM", "AutoTokenizer", "generate(", "vllm", "None"):
        assert absent not in card
    diffusion = mapping is not None and not mapping["parent_library"].startswith("transformers")
    assert ("transformers" in data["tags"]) == (not diffusion)


def test_records_of_trl_without_a_task_type_are_of_language_models():
    card = render(RunRecord(method="lora", model="org/base", tags=["trl", "sft"]))
    assert "AutoModelForCausalLM" in card


def test_an_unknown_method_is_refused():
    with pytest.raises(
        ValueError, match=r"There is no method .magic.; a record.s method is one of lora, .* or a type"
    ):
        render(RunRecord(method="magic", model="org/base"))


# vLLM


def adapter(**peft):
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **peft}
    return RunRecord(method="lora", model="org/base", base_model="org/base", peft=settings)


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        *(({}, 8), ({"r": 1}, 8), ({"r": 9}, 16), ({"r": 64}, 64), ({"r": 65}, 128), ({"r": 128}, 128)),
        *(({"r": 512}, 512), ({"r": 1024}, None), ({"use_rslora": True}, 8), ({"init_lora_weights": "gaussian"}, 8)),
        *(({"use_dora": True}, None), ({"bias": "lora_only"}, None), ({"lora_bias": True}, None)),
        *(({"modules_to_save": ["lm_head"]}, None), ({"rank_pattern": {"q_proj": 4}}, None)),
        *(({"alpha_pattern": {"q_proj": 4}}, None), ({"trainable_token_indices": [1]}, None)),
        *(({"target_parameters": ["experts.w"]}, None), ({"target_modules": ["embed_tokens"]}, None)),
        *(({"init_lora_weights": "pissa"}, None), ({"layer_replication": [[0, 2]]}, None)),
        ({"alora_invocation_tokens": [5]}, None),
    ],
    ids=str,
)
def test_the_line_for_vllm_stands_where_vllm_takes_the_adapter(settings, rank):
    record = adapter(**settings)
    assert vllm_rank(record) == rank
    assert (f"--max-lora-rank {rank} " in render(record)) == (rank is not None)
    assert ("vllm" in render(record)) == (rank is not None)


def test_an_exported_adapter_is_served_by_its_own_rank():
    record = RunRecord.from_dict(
        {
            **adapter(r=128, rank_pattern={"q_proj": 4}).to_dict(),
            "method": "lora_sb",
            "diagnostics": {"ranks": [4, 128]},
        }
    )
    assert vllm_rank(record) is None
    assert vllm_rank(record, exported=True) == 128


# The configuration's file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": None}, r"adapter_config.json names no peft_type, .* Add one, such as .peft_type.: .LORA."),
        ({"peft_type": "lora"}, r"the peft_type 'lora', which PEFT \S+ does not know. PEFT writes it as .LORA."),
        ({"peft_type": "NEWEST"}, r"the peft_type 'NEWEST', which PEFT \S+ does not know. Update PEFT."),
        ({"peft_type": 3}, r"the peft_type 3, which PEFT"),
        ("[]", "names no peft_type"),
        ("{", "is no JSON"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused_in_a_sentence(tmp_path, change, message):
    get_peft_model(tiny.llama(), LoraConfig()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = {**json.loads(path.read_text()), **change} if isinstance(change, dict) else change
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        read_record(tmp_path)
