"""Trainings for distributed/test_backends.py in two processes: `… launch … train_backends.py OUT [CASE …]`.

Every process writes the trajectories of benchmarks/trajectories.py, and for every case what it raised, or nothing. One
process group serves all.
"""

import gc
import json
import sys
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.integrations.deepspeed import is_deepspeed_available
from trl import SFTConfig

from hf_reflora import (
    LoraSbCallback,
    LoraSbConfig,
    LoraSbSFTTrainer,
    RefLoraCallback,
    RefLoraSFTTrainer,
    RefLoraTrainer,
    create_reflora_optimizer,
    initialize_lora_sb_weights,
)
from hf_reflora.distributed.parameters import adapter_state_dict
from hf_reflora.lora_sb.initialize import mean_loss
from hf_reflora.reflora.optimizer import STEP_KEY
from hf_reflora.report.diagnostics import diagnostics


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import trajectories


CASES: dict[str, Callable[[Path], None]] = {}
# The record that README shows has ZeRO-0 and 1, too. The cases below have ZeRO-0; ZeRO-1 takes the ways of ZeRO-2.
TRAJECTORIES = ["DDP", "FSDP2", "FSDP2 at load", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"]
ZERO = [f"DeepSpeed ZeRO-{stage}" for stage in (0, 2, 3)] if is_deepspeed_available() else []
SGD = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0}


def case(*variants: str):
    """Registers a function of (folder, *variant), once for each variant "a, b"."""

    def register(function):
        for variant in variants or [""]:
            words = variant.split(", ") if variant else []
            name = ", ".join([function.__name__, *words])
            CASES[name] = lambda folder, words=words: function(folder, *words)
        return function

    return register


def adapted(config_cls: type = LoraConfig, base: nn.Module | None = None, **changes) -> PeftModel:
    base = trajectories.base_model() if base is None else base
    torch.manual_seed(1)
    settings = {"r": trajectories.RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(base, config_cls(**settings))
    if config_cls is LoraConfig:
        trajectories.spread(model)
    return model


def trainer(backend: str, folder: Path, callbacks: list, model: PeftModel | None = None, data=None, **changes):
    args = trajectories.arguments(backend, str(folder), **changes)
    return Trainer(
        model=adapted() if model is None else model,
        args=args,
        train_dataset=trajectories.rows() if data is None else data,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(step: Callable, steps: int = trajectories.STEPS, model: PeftModel | None = None) -> dict:
    """The adapter after a loop over the same rows, 4 a step, in this process alone; `step` follows the backward."""
    model = adapted() if model is None else model
    tokens = torch.tensor(trajectories.rows()["input_ids"])
    for ids in tokens.split(4)[:steps]:
        model(input_ids=ids, labels=ids).loss.backward()
        step(model)
        model.zero_grad()
    return get_peft_model_state_dict(model)


def close(found: dict, expected: dict, atol: float = 5e-6) -> None:
    tiny.assert_same(found, expected, rtol=0, atol=atol)


def differ(left: dict, right: dict, at_least: float = 1e-3) -> None:
    assert max((left[name] - right[name]).abs().max() for name in left) > at_least


CLIP = 0.05


def clipped_sgd(after: bool) -> Callable[[PeftModel], None]:
    def step(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        if not after:
            assert nn.utils.clip_grad_norm_(trained, CLIP) > 2 * CLIP
        tiny.precondition_by_hand(tiny.linear_pairs(model), "reflora", eps=1e-5)
        if after:
            assert nn.utils.clip_grad_norm_(trained, CLIP) > 2 * CLIP
        with torch.no_grad():
            for p in trained:
                p.sub_(p.grad)

    return step


@case("DDP", "FSDP2", *ZERO[1:])
def clipping(folder, backend):
    """Before the preconditioning; under DeepSpeed after it."""
    run = trainer(backend, folder, [RefLoraCallback()], max_grad_norm=CLIP, **SGD)
    run.train()
    before, after = by_hand(clipped_sgd(after=False)), by_hand(clipped_sgd(after=True))
    differ(before, after)
    close(adapter_state_dict(run.model), after if backend in ZERO else before)


SETTINGS = {"warmup_steps": 1, "interval": 2, "smoothness": 10.0}


def stepped(method: str, **settings) -> Callable[[PeftModel], None]:
    optimizers = []

    def step(model):
        if not optimizers:
            kwargs = {"lr": 0.01, "weight_decay": 0.1, "method": method, **settings}
            optimizers.append(create_reflora_optimizer(model, torch.optim.AdamW, **kwargs))
        optimizers[0].step()

    return step


@cache
def with_settings(method: str) -> dict:
    """The adapter after 4 steps with SETTINGS, each of which matters."""
    expected = by_hand(stepped(method, **SETTINGS), steps=4)
    for name in SETTINGS:
        changed = {key: value for key, value in SETTINGS.items() if key != name}
        differ(expected, by_hand(stepped(method, **changed), steps=4), 1e-4)
    return expected


@case(*(f"{backend}, {method}" for backend in ["FSDP2", *ZERO] for method in ("reflora", "reflora_s")))
def settings(folder, backend, method):
    run = trainer(backend, folder, [RefLoraCallback(method, **SETTINGS)], max_steps=4)
    run.train()
    assert not any(p._backward_hooks for p in run.model.parameters())
    close(adapter_state_dict(run.model), with_settings(method), 2e-5)


@case("reflora", "reflora_s")
def two_calls_of_train(folder, method):
    """The steps are counted anew. Under DeepSpeed transformers' second call fails, with every method."""
    run = trainer("FSDP2", folder, [RefLoraCallback(method, warmup_steps=2)], max_steps=3)
    run.train()
    run.train()
    model = adapted()
    kwargs = {"lr": 0.01, "weight_decay": 0.1, "method": method, "warmup_steps": 2}
    optimizer = create_reflora_optimizer(model, torch.optim.AdamW, **kwargs)
    for _ in range(2):
        optimizer.param_groups[0][STEP_KEY] = 0
        by_hand(lambda _: optimizer.step(), 3, model)
    close(adapter_state_dict(run.model), get_peft_model_state_dict(model), 2e-5)


@case(*(f"{backend}, {kind}" for backend in ["FSDP2", *ZERO[1:]] for kind in ("RefLoRA", "LoRA-SB")))
def published(folder, backend, kind, **changes):
    """Record, card, adapter and resume of the project's own trainers."""

    def run(name, resume=None):
        args = trajectories.arguments(
            backend,
            str(folder / name),
            SFTConfig,
            **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "activation_checkpointing": False},
            **changes,
        )
        model = adapted(LoraConfig if kind == "RefLoRA" else LoraSbConfig, tiny.llama(tie_word_embeddings=False))
        cls = RefLoraSFTTrainer if kind == "RefLoRA" else LoraSbSFTTrainer
        data = tiny.token_dataset(24, labels=False)
        trainer = cls(model=model, args=args, train_dataset=data, processing_class=tiny.tokenizer())
        trainer.train(resume)
        trainer.save_model()
        dist.barrier()
        return trainer, adapter_state_dict(trainer.model)

    trainer, tensors = run("whole")
    assert len(tensors) == (28 if kind == "RefLoRA" else 42)
    out = folder / "whole"
    tiny.assert_same(load_file(out / "adapter_model.safetensors"), tensors)
    loaded = PeftModel.from_pretrained(tiny.llama(tie_word_embeddings=False), out)
    tiny.assert_same(get_peft_model_state_dict(loaded), tensors)
    checkpoint = load_file(out / "checkpoint-2" / "adapter_model.safetensors")
    assert checkpoint.keys() == tensors.keys()
    differ(checkpoint, tensors)
    for at, weights in ((out, tensors), (out / "checkpoint-2", checkpoint)):
        record = json.loads((at / "run_record.json").read_text())
        assert record["backend"] == backend.removesuffix(" checkpointed")
        assert record["processes"] == 2
        expected = diagnostics(trainer.model.active_peft_config, weights)
        assert str(rounded(record["diagnostics"])) == str(rounded(expected))
    assert backend.removesuffix(" checkpointed") in (out / "README.md").read_text()
    again, resumed = run("again", str(out / "checkpoint-2"))
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    assert losses(again) == losses(trainer)
    tiny.assert_same(resumed, tensors)


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


@case("RefLoRA", "LoRA-SB")
def checkpointed_layers(folder, kind):
    published(folder, "FSDP2 checkpointed", kind)


BF16 = {
    "RefLoRA": (LoraConfig, lambda: RefLoraCallback()),
    "RefLoRA-S": (LoraConfig, lambda: RefLoraCallback("reflora_s")),
    "LoRA-SB": (LoraSbConfig, lambda: LoraSbCallback(num_samples=7, update="gradient", eta=1.0)),
}


@cache
def float32(folder: Path, kind: str) -> tuple[list[float], dict]:
    config_cls, callback = BF16[kind]
    run = trainer("DDP", folder, [callback()], adapted(config_cls), max_steps=4)
    run.train()
    return losses(run), adapter_state_dict(run.model)


@case(*(f"{backend}, {kind}" for backend in ["FSDP2", *ZERO] for kind in BF16))
def bf16(folder, backend, kind):
    """Near float32; where DeepSpeed's float32 copies cannot be changed it is refused, and nothing is lost silently."""
    config_cls, callback = BF16[kind]
    run = trainer(backend, folder, [callback()], adapted(config_cls), bf16=True, max_steps=4)
    if backend == "DeepSpeed ZeRO-0" and kind != "RefLoRA":
        with pytest.raises(NotImplementedError, match=r"ZeRO-0 steps on a float32 copy.*Use ZeRO-1, 2 or 3"):
            run.train()
        return
    run.train()
    in_float32, expected = float32(folder.parent, kind)
    assert losses(run) != in_float32
    assert losses(run) == pytest.approx(in_float32, abs=0.01)
    # Adam's first steps are as large as R. Plain LoRA differs as much, with ZeRO-0 twice as much as with the others.
    limit = 0.3 if kind == "LoRA-SB" else 0.15
    moved = adapter_state_dict(run.model)
    for name, value in expected.items():
        assert (moved[name] - value).norm() < limit * value.norm(), name


ALONE = {"uneven": 7, "one sample": 1, "masked": 8}  # of all samples, how many are taken


@case(*(f"{backend}, {kind}" for backend in ["DDP", "FSDP2", *ZERO[2:]] for kind in ALONE))
def shares(folder, backend, kind):
    """LoRA-SB's start is that of one process with all the samples: also with fewer here, none, or without a label."""
    data, wanted = trajectories.rows(), ALONE[kind]
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:wanted].tolist()
    if kind == "masked":  # the first sample of the one process, the first and the last one of the other
        hidden = {chosen[0], chosen[1], chosen[-1]}
        labels = [[-100] * 12 if i in hidden else row["labels"] for i, row in enumerate(data)]
        data = data.remove_columns("labels").add_column("labels", labels)
    forward_fn = masked_loss if kind == "masked" else None
    callback = LoraSbCallback(num_samples=wanted, update="gradient", eta=1.0, forward_fn=forward_fn)
    model = adapted(LoraSbConfig)
    run = trainer(backend, folder, [callback], model, data, max_steps=1, learning_rate=0.0, weight_decay=0.0)
    run.train()
    alone = adapted(LoraSbConfig)
    rows = [data[i] for i in chosen if any(label != -100 for label in data[i]["labels"])]
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    with mock.patch.object(dist, "is_initialized", return_value=False):
        initialize_lora_sb_weights(alone, [batch], eta=1.0, update="gradient")
    found, expected = products(adapter_state_dict(run.model)), products(get_peft_model_state_dict(alone))
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-4 * value.norm(), name


def masked_loss(model, batch):
    """Not a number without labels, and its gradients, too."""
    kept = batch["labels"][:, 1:] != -100
    scores = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    found = scores.gather(-1, batch["labels"][:, 1:, None].clamp(min=0))[..., 0]
    return -(found * kept).sum() / kept.sum(), kept.sum()


def products(tensors: dict) -> dict:
    """B R A by layer."""
    ends = ("lorasb_B", "lorasb_R", "lorasb_A")
    layers = {name.rsplit(".", 1)[0] for name in tensors}
    return {layer: torch.linalg.multi_dot([tensors[f"{layer}.{end}"] for end in ends]) for layer in layers}


@case("reflora, before", "reflora_s, before", "reflora, after", "reflora_s, after")
def plain_loop(folder, method, made):
    """`create_reflora_optimizer` and `fully_shard` on factors that two processes cannot share evenly."""
    for r in (1, 3, 5):
        model, single = (tiny.lora(tiny.mlp(), r=r, target_modules=["0", "2", "4"]) for _ in range(2))
        kwargs = {"lr": 0.02, "method": method, "eps": 1e-12, "dtype": "float64", "weight_decay": 0.1}
        make = partial(create_reflora_optimizer, optimizer_cls=torch.optim.AdamW, **kwargs)
        optimizer = make(model) if made == "before" else None
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model.base_model.model[0], model):
            fully_shard(layer, mesh=mesh)
        if made == "before":
            tiny.mlp_loss(model, 0).backward()
            with pytest.raises(ValueError, match=r"made before the model was sharded.*optimizer after fully_shard"):
                optimizer.step()
            return
        optimizer = make(model)
        pairs = tiny.linear_pairs(single)
        plain = torch.optim.AdamW([p for p in single.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)

        def moments(parameter, plain=plain):
            return [(plain.state[parameter]["exp_avg"], 1), (plain.state[parameter]["exp_avg_sq"], 2)]

        for seed in range(4):
            for side, optim in ((model, optimizer), (single, plain)):
                side.zero_grad()
                tiny.mlp_loss(side, seed).backward()
                if side is single and method == "reflora":
                    tiny.precondition_by_hand(pairs, method)
                optim.step()
            if method == "reflora_s":
                tiny.rescale_by_hand(pairs, moments)
        close(adapter_state_dict(model), get_peft_model_state_dict(single), 1e-9)


@case("FSDP2", *ZERO[2:])
def files_without_weights(folder, backend):
    """Settings with which transformers would save none are refused when the trainer is made."""
    for method in (RefLoraTrainer, partial(LoraSbSFTTrainer, processing_class=tiny.tokenizer())):
        cls = TrainingArguments if method is RefLoraTrainer else SFTConfig
        args = trajectories.arguments(backend, str(folder), cls)
        if backend == "FSDP2":
            args.fsdp_plugin_args["state_dict_type"] = "SHARDED_STATE_DICT"
            match = "With .*SHARDED_STATE_DICT a Trainer saves no adapter. Choose FULL_STATE_DICT"
        else:
            zero = args.hf_deepspeed_config.config["zero_optimization"]
            zero["stage3_gather_16bit_weights_on_model_save"] = False
            match = "an adapter without weights unless stage3_gather_16bit_weights_on_model_save is true"
        model = adapted(LoraConfig if method is RefLoraTrainer else LoraSbConfig)
        with pytest.raises(ValueError, match=match):
            method(model=model, args=args, train_dataset=trajectories.rows())


class Broken(Exception):
    pass


def broken_forward(out: Path) -> None:
    """On one process, whose launcher has to end the other, which waits for it: the last case, outside of CASES."""

    def forward_fn(model, batch):
        if dist.get_rank() == 1:
            raise Broken("in the forward pass of process 1")
        return mean_loss(model, batch)

    trainer("FSDP2", out, [LoraSbCallback(num_samples=4, forward_fn=forward_fn)], adapted(LoraSbConfig)).train()


def follow_trajectories(out: Path) -> None:
    """The same training on every backend; the folder has the base model that "FSDP2 at load" starts from."""
    for backend in TRAJECTORIES:
        if ZERO or not backend.startswith("DeepSpeed"):
            for method in trajectories.METHODS:
                found = trajectories.run(backend, method, str(out))
                torch.save(found, out / f"{backend}-{method}-{dist.get_rank()}.pt")


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # as conftest.py does
    trajectories.arguments("DDP", str(out))  # the process group
    if not names:
        follow_trajectories(out)
    found = {}
    for name in names or CASES:
        folder = out / name
        folder.mkdir(exist_ok=True)
        try:
            CASES[name](folder)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        if dist.get_rank() == 0 or found[name]:
            print(name, found[name], flush=True)
        torch.save(found, out / f"found-{dist.get_rank()}.pt")
    if not names:
        broken_forward(out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
