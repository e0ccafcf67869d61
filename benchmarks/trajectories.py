"""Compares the training on every backend with the training in one process: the same rows, steps and methods.

    python benchmarks/trajectories.py [--record FILE]

A tiny Llama learns 24 random rows in 6 steps of 4 rows. One process accumulates 4 micro-batches; two processes, over
gloo on the CPU, accumulate 2 each, with every backend. Prints for each backend and method by how much the losses and
the adapter's numbers differ from those of the one process, and whether both processes have the same numbers.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.distributed import DistributedConfig
from transformers.integrations.deepspeed import is_deepspeed_available, unset_hf_deepspeed_config

from hf_reflora import LoraSbCallback, LoraSbConfig, RefLoraCallback
from hf_reflora.distributed.parameters import adapter_state_dict
from hf_reflora.report.environment import environment, write_json


STEPS, ROWS, RANK = 6, 24, 5  # a rank that two processes cannot share evenly
# LoRA-SB takes the gradient and not its sign, which rounding may flip for an entry near 0.
METHODS = {
    "LoRA": (LoraConfig, []),
    "RefLoRA": (LoraConfig, [lambda: RefLoraCallback()]),
    "RefLoRA-S, rescale": (LoraConfig, [lambda: RefLoraCallback("reflora_s")]),
    "RefLoRA-S, precondition": (LoraConfig, [lambda: RefLoraCallback("reflora_s", form="precondition")]),
    "LoRA-SB": (LoraSbConfig, [lambda: LoraSbCallback(num_samples=7, update="gradient", eta=1.0)]),
    "RefLoRA from LoRA-SB": (
        LoraConfig,
        [lambda: LoraSbCallback(num_samples=7, update="gradient", eta=1.0), lambda: RefLoraCallback()],
    ),
}
ONE = "1 process"
TWO = ("DDP", "FSDP2", "FSDP2 at load", *(f"DeepSpeed ZeRO-{stage}" for stage in range(4)))


def rows() -> Dataset:
    tokens = torch.randint(0, 256, (ROWS, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 45, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def is_sharded_by_accelerate(backend: str) -> bool:
    return backend.startswith("FSDP2") and backend != "FSDP2 at load"


def backend_settings(backend: str) -> dict:
    """The training arguments that choose the backend."""
    if is_sharded_by_accelerate(backend):
        fsdp_config = {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "activation_checkpointing": backend == "FSDP2 checkpointed",
        }
        return {"fsdp": True, "fsdp_config": fsdp_config}
    if backend.startswith("DeepSpeed"):
        import deepspeed.ops

        # Its own communication in shared memory would be compiled first, for minutes; gloo does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        zero = {"stage": int(backend[-1])}
        if zero["stage"] == 3:
            zero["stage3_param_persistence_threshold"] = 0  # or it would not partition parameters as small as these
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        return {"deepspeed": {**dict.fromkeys(automatic, "auto"), "zero_optimization": zero}}
    return {}


def arguments(backend: str, folder: str, cls: type = TrainingArguments, **changes) -> TrainingArguments:
    """Arguments that start afresh with a backend, also after another one in the same process.

    The process group stays; what accelerate and transformers remember of the last backend is reset.
    """
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)
    settings = {
        **backend_settings(backend),
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4 if backend == ONE else 2,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "max_grad_norm": 0,  # DeepSpeed clips after the preconditioning, the others before it
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "save_only_model": backend == "FSDP2 at load",  # transformers demands it there
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_broadcast_buffers": False,
        "seed": 0,
    }
    args = cls(**{**settings, **changes})
    if is_sharded_by_accelerate(backend):
        # accelerate shards only where this type says that there are accelerators. All that follows is its own code:
        # prepare and fully_shard, here on the CPU.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def run(backend: str, method: str, folder: str) -> dict:
    """Trains once; returns the losses and the adapter as this process has them."""
    config_cls, callbacks = METHODS[method]
    # With its usual epsilon Adam would take steps of full size on gradients that are nothing but rounding errors.
    args = arguments(backend, folder, adam_epsilon=1e-3)
    model = base_model()
    if backend == "FSDP2 at load":
        saved = Path(folder) / "base"
        model = AutoModelForCausalLM.from_pretrained(saved, distributed_config=DistributedConfig(fsdp_size=2))
    torch.manual_seed(1)
    model = get_peft_model(model, config_cls(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    if method in ("LoRA", "RefLoRA", "RefLoRA-S, rescale", "RefLoRA-S, precondition"):
        spread(model)
    start = adapter_state_dict(model)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows(),
        data_collator=default_data_collator,
        callbacks=[make() for make in callbacks],
    )
    trainer.train()
    kind = {"FSDP2": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}
    assert kind.get(backend.split(" ZeRO")[0], True), f"{backend} was not chosen"
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "start": start,
        "adapter": adapter_state_dict(trainer.model),
        "processes": args.world_size,
    }


@torch.no_grad()
def spread(model: torch.nn.Module) -> None:
    """Makes B as it may be in the middle of a training: its columns differ in size and are far from balanced."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            sizes = torch.linspace(0.02, 0.1, RANK)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * sizes)


def worker(folder: str, backends: list[str], methods: list[str]) -> None:
    """Runs everything in this process, or in each of two, and saves each result in `folder`."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # Trainer.train() collects garbage, which would take longer than these few steps
    rank = int(os.environ.get("RANK", 0))
    for backend in backends:
        for method in methods:
            result = run(backend, method, folder)
            torch.save(result, Path(folder) / f"{backend}-{method}-{rank}.pt")
            if rank == 0:
                print(f"{backend}, {method}: last loss {result['losses'][-1]:.4f}", file=sys.stderr, flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def measure(backends: list[str], methods: list[str]) -> list[dict]:
    """Runs everything in processes of its own; returns an entry for each backend and method."""
    with tempfile.TemporaryDirectory() as folder:
        base_model().save_pretrained(Path(folder) / "base")
        for processes, names in ((1, [ONE]), (2, backends)):
            launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
            launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
            command = [sys.executable, *(launcher if processes == 2 else []), __file__, "--worker", folder]
            command += ["--backends", *names, "--methods", *methods]
            environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
            environ.setdefault("HF_HUB_OFFLINE", "1")
            path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
            environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
            subprocess.run(command, env=environ, check=True)
        return [compare(Path(folder), backend, method) for backend in backends for method in methods]


def compare(folder: Path, backend: str, method: str) -> dict:
    """The entry of the record for a backend and a method: losses, and differences from the one process."""
    one = torch.load(folder / f"{ONE}-{method}-0.pt")
    first, second = (torch.load(folder / f"{backend}-{method}-{rank}.pt") for rank in range(2))
    assert (one["processes"], first["processes"], second["processes"]) == (1, 2, 2)
    assert one["adapter"].keys() == first["adapter"].keys()
    return {
        "backend": backend,
        "method": method,
        "losses": first["losses"],
        "loss_difference": max(abs(a - b) for a, b in zip(one["losses"], first["losses"], strict=True)),
        "adapter_difference": distance(one["adapter"], first["adapter"]),
        "adapter_moved": distance(one["start"], one["adapter"]),
        "equal_on_both": all(
            torch.equal(tensor, second["adapter"][name]) for name, tensor in first["adapter"].items()
        ),
    }


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference between two numbers of two adapters."""
    return max((tensor - right[name]).abs().max().item() for name, tensor in left.items())


def table(entries: list[dict]) -> str:
    """A Markdown table of `measure`'s entries."""
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    by_place = {(entry["backend"], entry["method"]): entry for entry in entries}
    lines = [f"| 2 processes × 2 | {' | '.join(methods)} | same on both |", f"| --- |{' ---: |' * len(methods)} --- |"]
    moved = (f"{by_place[entries[0]['backend'], method]['adapter_moved']:.0e}" for method in methods)
    lines.append(f"| {ONE} moves the adapter by | {' | '.join(moved)} | |")
    for backend in dict.fromkeys(entry["backend"] for entry in entries):
        row = [by_place[backend, method] for method in methods]
        cells = [f"{entry['loss_difference']:.0e}, {entry['adapter_difference']:.0e}" for entry in row]
        same = "yes" if all(entry["equal_on_both"] for entry in row) else "no"
        lines.append(f"| {backend} | {' | '.join(cells)} | {same} |")
    return "\n".join(lines)


def main() -> None:
    backends = [name for name in TWO if is_deepspeed_available() or not name.startswith("DeepSpeed")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="file to write the figures into")
    parser.add_argument("--backends", nargs="+", choices=[ONE, *TWO], default=backends, metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.backends, options.methods)
        return
    entries = measure(options.backends, options.methods)
    print("Largest difference from one process × 4: of the losses, of the adapter's numbers\n")
    print(table(entries))
    if options.record:
        facts = environment()
        if is_deepspeed_available():
            facts["versions"]["deepspeed"] = version("deepspeed")
        write_json(options.record, {"environment": facts, "results": entries})


if __name__ == "__main__":
    main()
