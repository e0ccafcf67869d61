"""`pip install hf_reflora` without its extras: RefLoRA and LoRA-SB work, and what needs an extra names it."""

import subprocess
import sys

import pytest


# Without an entry in sys.modules Python, and transformers, take these libraries for not installed.
WITHOUT_EXTRAS = """
import sys
for name in ("trl", "datasets", "matplotlib", "gguf", "rich", "deepspeed", "gradio", "optuna"):
    sys.modules[name] = None
"""
TRAINING = """
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, default_data_collator

from hf_reflora import LoraSbCallback, RefLoraCallback, RefLoraTrainer

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0}
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
rows = [{"input_ids": [i % 60 + 1] * 8, "labels": [i % 60 + 1] * 8} for i in range(16)]
trainer = RefLoraTrainer(
    model=get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])),
    args=TrainingArguments(sys.argv[1], max_steps=3, report_to="none", use_cpu=True, logging_steps=1),
    train_dataset=rows,
    data_collator=default_data_collator,
    reflora=RefLoraCallback(),
    callbacks=[LoraSbCallback(num_samples=4)],
)
trainer.train()
trainer.save_model()
print(sorted(path.name for path in Path(sys.argv[1]).iterdir() if path.is_file()))
for name in ("trl", "datasets", "matplotlib"):
    assert sys.modules.get(name) is None, name
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_EXTRAS + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_training_without_extras(tmp_path):
    done = run(TRAINING, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "README.md" in done.stdout
    assert "run_record.json" in done.stdout
    assert "training.png" not in done.stdout
    assert 'pip install "hf_reflora[hub]"' in done.stderr  # the plot that is left out


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "from hf_reflora import RefLoraSFTTrainer",
            "A trainer of TRL with RefLoRA or LoRA-SB needs trl, which is not installed: "
            'pip install "hf_reflora[trl]"',
        ),
        (
            "import hf_reflora.recipes.sft",
            'A recipe needs datasets, which is not installed: pip install "hf_reflora[demo]"',
        ),
        (
            "import hf_reflora.sweep.plan",
            'A sweep needs matplotlib, which is not installed: pip install "hf_reflora[sweep]"',
        ),
    ],
)
def test_the_error_names_the_extra(statement, message):
    done = run(statement)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == f"ImportError: {message}"


def test_benchmarks_have_an_extra_of_their_own():
    code = "import sys; sys.modules['lm_eval'] = None; import hf_reflora.recipes.benchmarks"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    message = 'A benchmark needs lm_eval, which is not installed: pip install "hf_reflora[eval]"'
    assert done.stderr.splitlines()[-1] == f"ImportError: {message}"
