"""Whether vLLM serves an adapter, and with which largest rank."""

from .record import RunRecord


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices of --max-lora-rank
# Settings of a LoRA with which vLLM refuses the adapter, or ignores the setting and computes something else. Values
# that are fine are given; any other value is not.
VLLM_TAKES = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": ([], None),
    "rank_pattern": ({}, None),  # of the patterns vLLM knows none: it scales each layer by alpha / r
    "alpha_pattern": ({}, None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "layer_replication": ([], None),
    "alora_invocation_tokens": (None,),  # an activated LoRA counts from these tokens on
    # The others change the base model's weights, too, which vLLM takes as they are.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", None),
}
NO_TARGETS = ("embed_tokens", "lm_head", "wte")


def vllm_rank(record: RunRecord, exported: bool = False) -> int | None:
    """The smallest of vLLM's ranks that an ordinary LoRA fits in; None where vLLM refuses or miscomputes it.

    None also where that cannot be told, because the record knows neither the rank nor PEFT's settings.

    Args:
        record: The adapter's record.
        exported: The files are the exported LoRA of a LoRA-SB adapter, which has one rank in all layers.
    """
    ordinary = exported or record.method in ("lora", "reflora", "reflora_s")
    if not record.base_model or not ordinary:
        return None
    names = ("modules_to_save", "trainable_token_indices") if exported else tuple(VLLM_TAKES)
    if any(record.peft.get(name) not in VLLM_TAKES[name] for name in names):
        return None
    if any(name in str(record.peft.get("target_modules")) for name in NO_TARGETS):
        return None
    ranks = record.diagnostics.get("ranks") or [record.arguments.get("lora_r", record.peft.get("r"))]
    largest = ranks[-1] if ranks[-1] is not None else 8 if record.peft else None  # 8 is PEFT's default
    return next((rank for rank in VLLM_RANKS if isinstance(largest, int) and rank >= largest), None)
