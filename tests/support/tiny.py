"""Models, tokenizer and data small enough for one CPU thread, and RefLoRA written out by hand in float64."""

import copy

import reference
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from versions import training_arguments


SPECIAL = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(SPECIAL + alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )


def llama(seed: int = 0, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **config}
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, **config}
    return LlamaForCausalLM(LlamaConfig(pad_token_id=0, bos_token_id=None, eos_token_id=1, **config))


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=260, max_position_embeddings=32, **sizes))


def opt() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"word_embed_proj_dim": 16, "max_position_embeddings": 32, "vocab_size": 260}
    return OPTForCausalLM(OPTConfig(**sizes, dropout=0.5, attention_dropout=0.5))


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=260, **sizes, decoder_start_token_id=0))


def save(folder, **config) -> None:
    """A base model and its tokenizer, as a folder that `from_pretrained` takes."""
    llama(**config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def quantize(model: nn.Module, bits: int) -> nn.Module:
    """Puts bitsandbytes layers in place of the linear ones but the head; returns a copy with dequantized weights."""
    import bitsandbytes as bnb

    dequantized = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        if bits == 4:
            weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            W = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32)
        else:
            weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False).to("cpu")
            W = weight.data * weight.SCB[:, None] / 127
            new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
        new.weight = weight
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        dequantized.get_submodule(name).weight = nn.Parameter(W.float())
    return dequantized


def lora(model: nn.Module, seed: int = 1, **config) -> nn.Module:
    """`model` with adapters in the middle of training: B is not 0 and the factors are far from balance."""
    llm = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} if hasattr(model, "config") else {}
    torch.manual_seed(seed)
    model = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"], **llm, **config})
    )
    fill_B(model)
    return model


@torch.no_grad()
def fill_B(model: nn.Module, seed: int = 2) -> None:
    """Noise for every factor that starts at 0 (B, and A of an embedding), with columns of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.ndim > 1 and not parameter.any():
            size = torch.linspace(0.02, 0.1, parameter.shape[1], dtype=parameter.dtype)
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(noise * size.view(1, -1, *[1] * (parameter.ndim - 2)))


def token_dataset(n: int = 16, length: int = 12, labels: bool = True) -> Dataset:
    """Sequences of one length, so that the mean over micro-batches is the mean over tokens."""
    tokens = torch.randint(4, 260, (n, length), generator=torch.Generator().manual_seed(3)).tolist()
    return Dataset.from_dict({"input_ids": tokens, **({"labels": tokens} if labels else {})})


def chat_dataset(n: int = 8) -> Dataset:
    talk = [
        [{"role": "user", "content": f"{i} + {i}"}, {"role": "assistant", "content": str(2 * i)}] for i in range(n)
    ]
    return Dataset.from_dict({"messages": talk})


def arguments(output_dir, **changes) -> dict:
    """Keyword arguments of TrainingArguments or SFTConfig: 4 steps on the CPU, data in order, nothing reported."""
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        **changes,
    }
    return training_arguments(settings)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return tuple(torch.randn(5, width, generator=generator, dtype=torch.float64).to(dtype) for width in (6, 3))


def mlp_loss(model: nn.Module, seed: int) -> Tensor:
    x, y = batch(seed, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], **tolerance) -> None:
    """Equal names and values, bit for bit unless a tolerance is given."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m: name + m)  # noqa: B023


def linear_pairs(model: nn.Module, adapter: str = "default") -> list[tuple[nn.Parameter, nn.Parameter, float]]:
    """(A, B, scaling) of every PEFT Linear, found without hf_reflora."""
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    return [(m.lora_A[adapter].weight, m.lora_B[adapter].weight, m.scaling[adapter]) for m in layers]


def hand_S(A: Tensor, B: Tensor, method: str, eps: float = 1e-12, inverse_step: float | None = None) -> Tensor:
    """S of Theorem 3, or s I of Theorem 5, with the small-step branch where `inverse_step` = 1 / (L η) is given."""
    a, b = A.detach().double().numpy(), B.detach().double().numpy()
    if method == "reflora":
        factor = 1.0 if inverse_step is None else reference.small_step_factor(a, b, inverse_step)
        return torch.from_numpy(factor * reference.refactoring(a, b, eps))
    s = reference.scalar(a, b) if inverse_step is None else reference.small_step_scalar(a, b, inverse_step)
    return s * torch.eye(len(a), dtype=torch.float64)


@torch.no_grad()
def precondition_by_hand(pairs, method: str, inverse_step=None, eps: float = 1e-12) -> None:
    """∇A ← S⁻¹ ∇A and ∇B ← ∇B S on (A, B, scaling); `inverse_step` is a function of the scaling."""
    for A, B, scaling in pairs:
        S = hand_S(A, B, method, eps, inverse_step and inverse_step(scaling))
        A.grad.copy_(torch.linalg.solve(S, A.grad.double()))
        B.grad.copy_(B.grad.double() @ S)


@torch.no_grad()
def rescale_by_hand(pairs, moments, inverse_step=None) -> None:
    """A ← √s A and B ← B / √s, and along with them the moments that `moments(parameter)` lists as (tensor, degree)."""
    for A, B, scaling in pairs:
        root = hand_S(A, B, "reflora_s", inverse_step=inverse_step and inverse_step(scaling))[0, 0].sqrt()
        for parameter, factor in ((A, root), (B, 1 / root)):
            parameter.mul_(factor)
            for moment, degree in moments(parameter):
                moment.div_(factor**degree)
