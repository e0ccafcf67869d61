"""Which adapters the page can show; `hf-reflora space` asks the same before it makes a Space."""

from peft import PeftConfig


def check_adapter(name: str, source: str, config: PeftConfig) -> None:
    """Raises a ValueError for an adapter that would change the base model's side, or whose own side would be wrong.

    Args:
        name: The adapter's name on the page.
        source: Its folder or its id on the Hub.
        config: Its configuration.
    """
    kind = getattr(config.peft_type, "value", None)
    if kind != "LORA":  # other methods ignore adapter_names, and the base's side would be the adapter's
        raise ValueError(f"{name}: this page shows LoRA adapters, {source} is {kind}. Export it to a LoRA.")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"{name}: this page shows models that write text, {source} is for {config.task_type}.")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(
            f"{name}: {source} changes the base model where it is loaded (init_lora_weights="
            f"{config.init_lora_weights!r}). Save it with path_initial_model_for_weight_conversion, as PEFT's "
            "save_pretrained says, and it is an ordinary LoRA."
        )
    unsupported = {"bias": config.bias != "none", "layer_replication": config.layer_replication}
    unsupported["alora_invocation_tokens"] = config.alora_invocation_tokens
    for setting, is_used in unsupported.items():
        if is_used:
            raise ValueError(f"{name}: this page can't show adapters with {setting}, and {source} has it.")
