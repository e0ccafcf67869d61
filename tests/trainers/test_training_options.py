"""Settings of a Trainer that change what a step is: batch sizes that shrink, overflows, several calls of train()."""

import pytest
import tiny
import tiny_trainer
import torch
from accelerate.state import AcceleratorState
from adapter_layers import adapters, everything
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from versions import UNCOUNTED_LABELS, needs

from hf_reflora import (
    LoraSbCallback,
    LoraSbConfig,
    RefLoraCallback,
    create_reflora_optimizer,
)


REFLORA = {
    "reflora": {"method": "reflora"},
    "reflora_s": {"method": "reflora_s"},
    "reflora_s precondition": {"method": "reflora_s", "form": "precondition"},
}
LAYERS = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
SB = {"lora_sb": LoraSbConfig, "lora": LoraConfig}  # LoRA-SB, and its start of an ordinary LoRA, with RefLoRA


def start(method: str, samples: int = 7):
    """A model of its own and the callbacks of the method."""
    if method in REFLORA:
        return tiny.lora(tiny.llama()), [RefLoraCallback(**REFLORA[method])]
    torch.manual_seed(1)
    callbacks = [LoraSbCallback(num_samples=samples), *([RefLoraCallback()] if method == "lora" else [])]
    return get_peft_model(tiny.llama(), SB[method](**LAYERS)), callbacks


def make_trainer(folder, method, model=None, callbacks=None, optimizers=(None, None), **changes) -> Trainer:
    made, used = start(method)
    more = {"callbacks": used if callbacks is None else callbacks, "optimizers": optimizers}
    return tiny_trainer.build(folder, Trainer, made if model is None else model, 32, more, **changes)


def rows(trainer) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


def small_memory(trainer, batch: int, where: str) -> list[tuple]:
    """The model runs out of memory above `batch` rows; returns (in training mode, rows) of every forward pass.

    `where`: "always", "training" (not in LoRA-SB's passes) or "second step" (one step at any size fits).
    """
    seen = []

    def check(module, args, kwargs):
        size = len(kwargs["input_ids"])
        seen.append((module.training, size))
        full = {"always": True, "training": module.training, "second step": len(seen) > 1}[where]
        if full and size > batch:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    trainer.model.get_base_model().register_forward_pre_hook(check, with_kwargs=True)
    return seen


@needs("accelerate", "1.9", "a batch size that shrinks by a tenth")
@needs("peft", "0.21", "a forward pass that runs the base model's hooks")
@pytest.mark.parametrize(
    ("method", "where"), [*((m, "training") for m in [*REFLORA, *SB]), *((m, "always") for m in SB)]
)
def test_auto_find_batch_size(tmp_path, method, where):
    """4 rows do not fit, nor do 3: the run is that of a trainer that was given 2.

    LoRA-SB's passes shrink, too, where theirs are what does not fit. Where they fit their factors stay: they are of
    the same samples, whatever the batches, and so equal to rounding.
    """
    run = make_trainer(tmp_path, method, auto_find_batch_size=True, per_device_train_batch_size=4)
    seen = small_memory(run, 2, where)
    run.train()
    sizes = [size for training, size in seen if training]
    assert sizes == ([2] * 4 if where == "always" else [4, 3, 2, 2, 2, 2])
    plain = make_trainer(tmp_path, method)
    plain.train()
    found, expected = tiny.trainable(run.model), tiny.trainable(plain.model)
    if method in SB and where == "training":
        assert len([size for training, size in seen if not training]) % 2 == 0  # 4 + 3 of the 7 samples, once a pass
        tiny.assert_same(found, expected, rtol=1e-3, atol=1e-5)
    else:
        tiny.assert_same(found, expected)
        assert rows(run) == rows(plain)


@needs("accelerate", "1.9", "a batch size that shrinks by a tenth")
@needs("peft", "0.21", "a forward pass that runs the base model's hooks")
@pytest.mark.parametrize("method", REFLORA)
def test_auto_find_batch_size_after_a_step(tmp_path, method):
    """A longer batch that does not fit any more: the Trainer goes on from where the model and AdamW are."""
    run = make_trainer(
        tmp_path, method, auto_find_batch_size=True, per_device_train_batch_size=3, lr_scheduler_type="constant"
    )
    seen = small_memory(run, 2, "second step")
    run.train()
    assert [size for _, size in seen] == [3, 3, 2, 2, 2, 2]
    plain = make_trainer(tmp_path, method, per_device_train_batch_size=3, max_steps=1, lr_scheduler_type="constant")
    plain.train()
    plain._train_batch_size, plain.args.max_steps = 2, 4
    plain.train()
    tiny.assert_same(tiny.trainable(run.model), tiny.trainable(plain.model))
    assert rows(run) == rows(plain)


# fp16: steps that overflow


class Begin(TrainerCallback):
    """Keeps the model as the training begins."""

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        self.state = everything(model)


def scaler() -> torch.amp.GradScaler:
    """Overflows in the first steps, and again as soon as it has grown."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)


def scaled_by_hand(model, method: str, steps: int, fused: bool) -> list[bool]:
    """AdamW with a GradScaler, and RefLoRA written out: a step that overflows is none, but factors are balanced."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, scale, overflows = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1, fused=fused), scaler(), []

    def moments(parameter):
        state = optimizer.state.get(parameter)
        return [(state["exp_avg"], 1), (state["exp_avg_sq"], 2)] if state else []

    for ids in torch.tensor(tiny.token_dataset(32)["input_ids"]).split(2)[:steps]:
        with torch.autocast("cpu", torch.float16):
            loss = model(ids, labels=ids, num_items_in_batch=torch.tensor(2 * (12 - UNCOUNTED_LABELS))).loss
        scale.scale(loss).backward()
        scale.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        overflows.append(not all(p.grad.isfinite().all() for p in trained))
        pairs = tiny.linear_pairs(model)
        if not overflows[-1]:
            if method not in ("lora_sb", "reflora_s"):
                tiny.precondition_by_hand(pairs, method.split()[0] if method in REFLORA else "reflora", eps=1e-5)
            optimizer.step()
        if method == "reflora_s":
            tiny.rescale_by_hand(pairs, moments)
        scale.update()
        optimizer.zero_grad()
    return overflows


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", [*REFLORA, *SB])
def test_steps_that_overflow_in_fp16(tmp_path, monkeypatch, method, fused):
    """Autocast and a GradScaler as accelerate sets them up on a GPU. (A fused AdamW skips inside its step.)"""
    begin, skipped = Begin(), []
    trainer = make_trainer(
        tmp_path,
        method,
        optim="adamw_torch_fused" if fused else "adamw_torch",
        lr_scheduler_type="constant",
        max_steps=8,
    )
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scaler()

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            skipped.append(trainer.accelerator.optimizer_step_was_skipped)

    trainer.add_callback(begin)
    trainer.add_callback(Watch())
    trainer.train()
    model = start(method)[0]
    model.load_state_dict(begin.state, strict=False)
    overflows = scaled_by_hand(model.train(), method, 8, fused)
    assert overflows[0]
    assert 2 <= sum(overflows[1:]) <= 5  # some come after good steps, when there are moments
    assert overflows.index(False) < len(overflows) - 1 - overflows[::-1].index(True)
    assert fused or skipped == overflows
    tiny.assert_same(tiny.trainable(trainer.model), tiny.trainable(model), rtol=1e-3, atol=1e-5)


# Several calls of train()


@pytest.mark.parametrize("method", SB)
def test_two_calls_of_train_initialize_once(tmp_path, method):
    """The second call goes on as one without LoRA-SB's callback, and nothing is left on the model."""
    results = []
    for again in (True, False):
        trainer = make_trainer(tmp_path, method)
        trainer.train()
        if not again:
            trainer.remove_callback(LoraSbCallback)
        trainer.train()
        results.append(tiny.trainable(trainer.model))
        assert not any(m._forward_hooks for m in trainer.model.modules() if isinstance(m, torch.nn.Linear))
    tiny.assert_same(*results)
    once = make_trainer(tmp_path, method)
    once.train()
    assert not any(torch.allclose(value, results[0][name]) for name, value in tiny.trainable(once.model).items())


@pytest.mark.parametrize("method", REFLORA)
def test_two_calls_of_train_with_create_reflora_optimizer(tmp_path, method):
    """The optimizer counts on, where the callback counts each call's steps anew; it refactors once a step."""
    model, settings = tiny.lora(tiny.llama()), REFLORA[method]
    optimizer = create_reflora_optimizer(
        model, torch.optim.AdamW, lr=0.01, weight_decay=0.1, warmup_steps=5, **settings
    )
    trainer = make_trainer(tmp_path, method, model, [], (optimizer, None))
    trainer.train()
    trainer.train()
    other = tiny.lora(tiny.llama())
    plain = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    callbacks = [RefLoraCallback(**settings, warmup_steps=5), RefLoraCallback(**settings, warmup_steps=1)]
    by_callback = make_trainer(tmp_path, method, other, callbacks[:1], (plain, None))
    by_callback.train()
    by_callback.remove_callback(RefLoraCallback)
    by_callback.add_callback(callbacks[1])
    by_callback.train()
    tiny.assert_same(tiny.trainable(model), tiny.trainable(other))


# LoRA-SB with torch.compile, accumulation, and without clipping


@pytest.mark.parametrize("method", SB)
def test_compiled_lora_sb(tmp_path, method):
    """The initialization runs on the model inside the compiled one, whose code must see the new factors; two calls."""
    results = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = make_trainer(tmp_path, method, max_steps=2, **changes)
        trainer.train()
        trainer.train()
        results.append(tiny.trainable(trainer.model))
        assert hasattr(trainer.model_wrapped, "_orig_mod") == bool(changes)
    tiny.assert_same(*results, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("method", SB)
def test_accumulation_is_a_larger_batch(tmp_path, method):
    starts, ends = [], []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer, begin = (
            make_trainer(tmp_path, method, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation),
            Begin(),
        )
        trainer.add_callback(begin)
        trainer.train()
        starts.append({name: begin.state[name] for name in tiny.trainable(trainer.model)})
        ends.append(tiny.trainable(trainer.model))
    for other_start, other_end in zip(starts[1:], ends[1:], strict=True):
        tiny.assert_same(starts[0], other_start, rtol=1e-4, atol=1e-6)
        tiny.assert_same(ends[0], other_end, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.005])
def test_lora_sb_is_the_projected_gradient_of_the_full_weights(tmp_path, clip):
    """SGD on R, with and without clipping, by Lemma 2: ∇R = s Bᵀ G Aᵀ, G of a dense model of the merged weights."""
    torch.manual_seed(1)
    model = get_peft_model(tiny.llama(), LoraSbConfig(**LAYERS, scaling=2.0))
    begin = Begin()
    changes = {"optim": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": clip}
    callbacks = [LoraSbCallback(num_samples=7, eta=0.01), begin]
    trainer = make_trainer(tmp_path, "lora_sb", model, callbacks, lr_scheduler_type="constant", **changes)
    trainer.train()
    dense, W0 = tiny.llama(), tiny.llama().state_dict()
    layers = {}
    for name in adapters(model):
        layers[name] = tuple(begin.state[f"base_model.model.{name}.lorasb_{k}.default"].clone() for k in "BRA")
    norms = []
    for ids in torch.tensor(tiny.token_dataset(32)["input_ids"]).split(2)[:4]:
        with torch.no_grad():
            for name, (B, R, A) in layers.items():
                dense.get_submodule(name).weight.copy_(W0[f"{name}.weight"] + 2.0 * B @ R @ A)
        dense.zero_grad()
        dense(ids, labels=ids).loss.backward()
        steps = {n: 2.0 * B.T @ dense.get_submodule(n).weight.grad @ A.T for n, (B, _, A) in layers.items()}
        norms.append(torch.stack([step.norm() for step in steps.values()]).norm())
        for name, (_, R, _) in layers.items():
            R -= steps[name] * (min(1, clip / norms[-1]) if clip else 1)
    assert min(norms) > 2 * 0.005
    for name, layer in adapters(model).items():
        torch.testing.assert_close(layer.lorasb_R["default"].detach(), layers[name][1], rtol=1e-3, atol=1e-6)
        assert (layers[name][1] - begin.state[f"base_model.model.{name}.lorasb_R.default"]).abs().max() > 1e-4
