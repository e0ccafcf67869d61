"""Adapters to push: saved as a trainer leaves them, without training."""

import json

import tiny
import torch
from peft import PeftModel, get_peft_model

from hf_reflora import LoraSbConfig


RECORD = {
    "schema": 2,
    "method": "reflora",
    "init": "default",
    "tags": ["trl", "sft"],
    "model": "me/base",
    "base_model": "me/base",
    "scores": {"rows": 4, "before": {"exact": 0.0}, "after": {"exact": 0.5}},
    "log": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}],
}
LEFT_OUT = [".env", "checkpoint-2", "optimizer.pt", "trainer_state.json", "training_args.bin"]


def lora(folder, seed=1, base="me/base", record=RECORD, **config):
    """A folder with a LoRA, a tokenizer, a run record, a plot and what must not be published."""
    model = tiny.lora(tiny.llama(), seed=seed, **config)
    return saved(model, folder, base, record)


def lora_sb(folder, base="me/base"):
    torch.manual_seed(3)
    config = LoraSbConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False, task_type="CAUSAL_LM")
    return saved(
        get_peft_model(tiny.llama(), config), folder, base, {**RECORD, "method": "lora_sb", "base_model": base}
    )


def saved(model: PeftModel, folder, base, record):
    model.active_peft_config.base_model_name_or_path = base
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "training.png").write_bytes(b"\x89PNG")
    if record is not None:
        (folder / "run_record.json").write_text(json.dumps(record), encoding="utf-8")
    for name in LEFT_OUT:
        if name.startswith("checkpoint"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "optimizer.pt").write_bytes(b"state")
        else:
            (folder / name).write_bytes(b"not for others")
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(4, 20)[None]).logits
