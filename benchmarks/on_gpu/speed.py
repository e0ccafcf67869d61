"""Parts that measure: a step's cost, a training step's, LoRA-SB's start."""

import gc
import time

import torch
from peft import LoraConfig, get_peft_model

from hf_reflora import LoraSbConfig, create_reflora_optimizer, initialize_lora_sb_weights

from .setting import Setting, adapters, random_batches, random_model, trainable


METHODS = {
    "RefLoRA": {"method": "reflora"},
    "RefLoRA-S rescale": {"method": "reflora_s"},
    "RefLoRA-S precondition": {"method": "reflora_s", "form": "precondition"},
}


def step_cost(setting: Setting) -> dict:
    """Milliseconds of the optimizer's step alone, by rank and dtype of the factors, for Llama-3-8B's 224 pairs."""
    config, figures = setting.large(), {"layers": setting.large().num_hidden_layers}
    for rank, dtype in [(16, torch.float32), (64, torch.float32), (16, torch.bfloat16)]:
        if setting.dry:
            rank //= 8
        row = figures[f"r = {rank}, {dtype}"] = {}
        model = adapters(config, rank, setting.device, dtype)
        gradients = [parameter.grad for parameter in trainable(model)]
        originals = [gradient.clone() for gradient in gradients]
        for name in ("AdamW", "AdamW fused", *METHODS):
            if name in METHODS:
                optimizer = create_reflora_optimizer(model, torch.optim.AdamW, lr=1e-4, **METHODS[name])
            else:
                optimizer = torch.optim.AdamW(trainable(model), lr=1e-4, fused=name == "AdamW fused")

            def step(optimizer=optimizer, gradients=gradients, originals=originals):
                torch._foreach_copy_(gradients, originals)  # the step before has preconditioned them in place
                optimizer.step()

            row[name] = setting.milliseconds(step, 3 if setting.dry else 20)
    return figures


def whole_step(setting: Setting) -> dict:
    """Tokens a second and peak memory of a training step, with activation checkpointing, by method."""
    config, device = setting.large(), setting.device
    size, length = (2, 16) if setting.dry else (4, 512)
    base = random_model(config, device, setting.dtype)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batches = random_batches(config, 2, size, length, device)
    rank = 2 if setting.dry else 16
    figures = {"layers": config.num_hidden_layers, "tokens": size * length}
    for name in ("LoRA", *METHODS, "LoRA-SB"):
        setting.reset_peak()
        if name == "LoRA-SB":
            model = get_peft_model(base, LoraSbConfig(r=2 * rank, target_modules="all-linear"))
            initialize_lora_sb_weights(model, batches, eta=1e-4, show_progress_bar=False)
        else:
            model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear"))
        model.train()
        if name in METHODS:
            optimizer = create_reflora_optimizer(model, torch.optim.AdamW, lr=1e-4, **METHODS[name])
        else:
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-4)

        def step(model=model, optimizer=optimizer):
            # As bf16=True does in a Trainer: the adapter's float32 factors are multiplied in bfloat16.
            with torch.autocast(device.type, torch.bfloat16, enabled=not setting.dry):
                loss = model(**batches[0]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        milliseconds = setting.milliseconds(step, 2 if setting.dry else 6)
        figures[name] = {"ms": milliseconds, "tokens/s": round(size * length / milliseconds * 1e3, 1)}
        figures[name]["peak_gb"] = setting.peak_gb()
        base = model.unload()
        del model, optimizer, step
        gc.collect()
    return figures


def init_cost(setting: Setting) -> dict:
    """Seconds and peak memory of LoRA-SB's start on 25 rows, and of one pass of LoRA's training over the same rows."""
    config, device = setting.large(), setting.device
    base = random_model(config, device, setting.dtype)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batches = random_batches(config, 2 if setting.dry else 25, 1, 16 if setting.dry else 512, device)
    rank = 4 if setting.dry else 64
    figures = {"layers": config.num_hidden_layers, "rank": rank}

    def one_pass(model):
        model.train()
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=not setting.dry):
                loss = model(**batch).loss
            loss.backward()

    def start(model):
        initialize_lora_sb_weights(model, batches, eta=1e-4, show_progress_bar=False)

    ways = {
        "one pass of LoRA": (LoraConfig(r=rank, target_modules="all-linear"), one_pass),
        "LoRA-SB's start": (LoraSbConfig(r=rank, target_modules="all-linear"), start),
    }
    for name, (adapter, work) in ways.items():
        with torch.no_grad():
            base(**batches[0])  # the first use of each kernel is slow
        model = get_peft_model(base, adapter)
        setting.reset_peak()
        setting.synchronize()
        begin = time.perf_counter()
        work(model)
        setting.synchronize()
        figures[name] = {"seconds": round(time.perf_counter() - begin, 3), "peak_gb": setting.peak_gb()}
        base = model.unload()
        del model
        gc.collect()
    return figures
