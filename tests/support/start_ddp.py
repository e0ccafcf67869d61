"""The SFT recipe from one of PEFT's starts in two processes, for recipes/test_starts.py."""

import sys
from pathlib import Path

import tiny
import torch

from hf_reflora.recipes import sft
from hf_reflora.recipes.run import Run


def main(out: Path, data: Path, init: str) -> None:
    trainers, finish = [], Run._finish
    Run._finish = lambda run, trainer, *a: trainers.append(trainer) or finish(run, trainer, *a)
    options = {"model_name_or_path": data / "model", "dataset_name": data / "rows.jsonl", "learning_rate": 1e-2}
    options |= {"output_dir": out / init, "use_cpu": "true", "bf16": "false", "cpu_threads": 1, "max_steps": 2}
    options |= {"lora_r": 4, "lora_target_modules": "all-linear", "per_device_train_batch_size": 4}
    options |= {"save_strategy": "no", "report_to": "none", "init": init, "method": "reflora"}
    line = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    sft.main(*sft.make_parser().parse_args_and_config(line))
    model = trainers[-1].model.eval()
    with torch.no_grad():
        logits = model(input_ids=tiny.tokenizer()("7 + 7 = ", return_tensors="pt")["input_ids"]).logits
    rank = trainers[-1].args.process_index
    torch.save({**model.state_dict(), "logits": logits}, out / f"{init}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
