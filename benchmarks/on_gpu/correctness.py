"""Parts that check: the tests for a GPU, precisions, quantized models, backends, CUDA graphs, the Space's engine."""

import os
import socket
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from hf_reflora import LoraSbCallback, LoraSbConfig, RefLoraTrainer, create_reflora_optimizer

from .setting import Setting, Skipped, adapters, random_model, train, trainable


ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "spaces" / "before_after")]


def tests(setting: Setting) -> dict:
    """The tests that are marked `gpu`; without a GPU pytest skips them all."""
    import pytest  # noqa: F401  # to be skipped, not failed, where it is missing

    folders = ["tests/reflora/test_callback.py"] if setting.dry else ["tests"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--junitxml", report, *folders]
        # A machine without TRL cannot even read the tests that need it.
        done = subprocess.run([*command, "--continue-on-collection-errors"], cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest ended with the status {done.returncode}: {done.stderr[-1000:]}")
        suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    if counts["failures"]:
        raise AssertionError(f"{counts}: {done.stdout[-2000:]}")
    if counts["tests"] == counts["skipped"] + counts["errors"]:
        raise Skipped(f"no test ran: {counts}")
    return counts


def agreement(setting: Setting) -> dict:
    """The largest relative difference of a preconditioned gradient from that which the CPU computes in float64."""
    config = setting.medium()

    def preconditioned(device: torch.device, **settings) -> list[torch.Tensor]:
        model = adapters(config, 8, device, drawn_on=torch.device("cpu"))
        create_reflora_optimizer(model, torch.optim.SGD, lr=0.0, **settings).step()
        return [parameter.grad.double().cpu() for parameter in trainable(model)]

    figures = {}
    for name, settings in {"reflora": {}, "reflora_s": {"method": "reflora_s", "form": "precondition"}}.items():
        reference = preconditioned(torch.device("cpu"), dtype="float64", **settings)
        computed = preconditioned(setting.device, **settings)
        pairs = zip(computed, reference, strict=True)
        figures[name] = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    assert max(figures.values()) < 1e-3, figures
    return figures


class _CountReads(TorchDispatchMode):
    """Counts the operations that wait for a device: reads of a number, and shapes that depend on numbers."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.count, self.operations = 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.operations += 1
        self.count += function.overloadpacket.__name__ in self.WAITING
        return function(*arguments, **options or {})


def sync(setting: Setting) -> dict:
    """A RefLoRA step waits for no result of the device; on a GPU, torch itself raises if it does."""
    figures = {}
    for method in ("none", "reflora", "reflora_s"):
        model = adapters(setting.large(), 4 if setting.dry else 16, setting.device)
        if method == "none":
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-4, foreach=True)
        else:
            optimizer = create_reflora_optimizer(model, torch.optim.AdamW, lr=1e-4, method=method, foreach=True)
        for _ in range(2):
            optimizer.step()
        with _CountReads() as reads:
            optimizer.step()
        figures[method] = {"operations": reads.operations, "reads": reads.count}
        if not setting.dry:
            with forbidden_synchronization():
                optimizer.step()
    return figures


@contextmanager
def forbidden_synchronization():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def cuda_graph(setting: Setting) -> dict:
    """Three steps that are replayed from a CUDA graph are those that are computed one by one."""
    setting.require_gpu()

    def make():
        model = adapters(setting.medium(), 8, setting.device)
        optimizer = create_reflora_optimizer(model, torch.optim.AdamW, lr=1e-4, capturable=True)
        gradients = [parameter.grad for parameter in trainable(model)]
        originals = [gradient.clone() for gradient in gradients]

        def step():
            torch._foreach_copy_(gradients, originals)
            optimizer.step()

        return model, step

    captured, step = make()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    expected, step_of_expected = make()
    for _ in range(6):
        step_of_expected()
    pairs = zip(trainable(captured), trainable(expected), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    assert difference < 1e-5, f"the factors differ by {difference}"
    return {"difference": difference, "ms of a replay": setting.milliseconds(graph.replay, 20)}


def mixed_precision(setting: Setting) -> dict:
    """Losses of RefLoRA's and LoRA-SB's trainers in float32, bf16 and (with a GradScaler, on a GPU only) fp16."""
    config, device = setting.medium(), setting.device
    figures = {}
    for precision in ("float32", "bf16", "fp16"):
        if precision == "fp16" and setting.dry:
            continue  # the Trainer refuses it on a CPU
        options = {} if precision == "float32" else {precision: True}
        for name, (trainer, adapter, callbacks) in trainers().items():
            model = get_peft_model(random_model(config, device, torch.float32), adapter)
            _, losses = train(trainer, model, config.vocab_size, setting.dry, callbacks=callbacks, **options)
            figures[f"{name}, {precision}"] = losses
    return figures


def trainers() -> dict:
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    lora_sb = LoraSbConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return {
        "RefLoRA": (RefLoraTrainer, lora, None),
        "LoRA-SB": (Trainer, lora_sb, [LoraSbCallback(num_samples=4)]),
    }


def qlora(setting: Setting) -> dict:
    """Losses with a base model in 4 and in 8 bits, loaded by transformers."""
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config, figures = setting.medium(), {}
    with tempfile.TemporaryDirectory() as folder:
        random_model(config, setting.device, setting.dtype).save_pretrained(folder)
        for bits in (4, 8):
            quantization = BitsAndBytesConfig(
                load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=setting.dtype
            )
            for name, (trainer, adapter, callbacks) in trainers().items():
                base = AutoModelForCausalLM.from_pretrained(
                    folder, quantization_config=quantization, dtype=setting.dtype, device_map={"": setting.device}
                )
                model = get_peft_model(base, adapter)
                options = {} if setting.dry else {"bf16": True}
                _, losses = train(trainer, model, config.vocab_size, setting.dry, callbacks=callbacks, **options)
                figures[f"{name}, {bits} bits"] = losses
    return figures


def ddp(setting: Setting) -> dict:
    return distributed(setting, "MULTI_GPU", {})


def fsdp2(setting: Setting) -> dict:
    # What `accelerate launch --config_file recipes/accelerate/fsdp2.yaml` sets.
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    variables |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    variables |= {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_OFFLOAD_PARAMS": "false"}
    return distributed(setting, "FSDP2", variables)


def distributed(setting: Setting, backend: str, variables: dict[str, str]) -> dict:
    """RefLoRA's trainer as the only process of a group: its losses are those without a group."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    config = setting.medium()

    def losses():
        # DDP moves a model from the CPU; FSDP2 shards it there, before it moves the parts.
        model = random_model(config, torch.device("cpu"), torch.float32)
        return train(RefLoraTrainer, get_peft_model(model, trainers()["RefLoRA"][1]), config.vocab_size, setting.dry)

    _, expected = losses()
    # The state of accelerate is the process's; it is made again from the variables.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
    if setting.dry and backend == "FSDP2":
        from launched import start_as_if_on_gpus  # accelerate shards on GPUs only

        PartialState.__init__ = start_as_if_on_gpus
    trainer, computed = losses()
    torch.distributed.destroy_process_group()
    found = trainer.run_record.record.backend
    assert found == ("MULTI_CPU" if setting.dry and backend == "MULTI_GPU" else backend), found
    difference = max(abs(a - b) for a, b in zip(computed, expected, strict=True))
    assert difference < 1e-3, f"{computed} instead of {expected}"
    return {"backend": found, "difference of the losses": difference}


def space(setting: Setting) -> dict:
    """The Space's engine answers with a base model and an adapter side by side."""
    import tiny
    from engine import Engine, Settings

    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        tiny.save(base)
        tiny.lora(tiny.llama()).save_pretrained(adapter)
        engine = Engine(str(base), {"adapter": str(adapter)}, device=setting.device.type)
        answers = list(engine.compare("2 + 2 =", "adapter", Settings(max_new_tokens=12)))[-1]
    mixed = engine._uses_mixed_batch["adapter"]
    return {"way": "mixed batch" if mixed else "in turn", "answers": [answer.text for answer in answers]}
