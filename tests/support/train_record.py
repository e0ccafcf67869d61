"""A small training in two processes, for report/test_recorder.py."""

import json
from pathlib import Path

import tiny
from trl import SFTConfig

from hf_reflora import RefLoraSFTTrainer
from hf_reflora.report import record


def train(out: Path) -> None:
    """Trains, saves, and lists the records that this process has written."""
    written, write = [], record.write_json

    def noted(path, *args):
        written.append(str(path))
        write(path, *args)

    record.write_json = noted
    trainer = RefLoraSFTTrainer(
        model=tiny.lora(tiny.llama()),
        args=SFTConfig(**tiny.arguments(out, save_strategy="steps", save_steps=2)),
        train_dataset=tiny.token_dataset(16, labels=False),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    trainer.save_model()
    (out / f"writes-{trainer.args.process_index}.json").write_text(json.dumps(written))
