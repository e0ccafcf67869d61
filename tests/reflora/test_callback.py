"""RefLoraCallback in transformers.Trainer and trl.SFTTrainer, as they are, against loops written by hand."""

import contextlib

import pytest
import tiny
import tiny_trainer
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, get_linear_schedule_with_warmup
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import SFTConfig, SFTTrainer
from versions import UNCOUNTED_LABELS

from hf_reflora import LoraSbCallback, LoraSbConfig, RefLoraCallback, RefLoraTrainer, create_reflora_optimizer
from hf_reflora.distributed import backend
from hf_reflora.reflora.optimizer import STEP_KEY


METHODS = {
    "reflora": {"method": "reflora"},
    "reflora_s": {"method": "reflora_s"},
    "reflora_s precondition": {"method": "reflora_s", "form": "precondition"},
}


def make_trainer(tmp_path, callbacks, kind=Trainer, model=None, optimizers=(None, None), **changes):
    more = {"callbacks": callbacks, "optimizers": optimizers}
    return tiny_trainer.build(tmp_path, kind, model, 32, more, **changes)


def run_by_hand(settings, steps=4, accumulation=1, clip=1.0, autocast=False, train_calls=1, sgd=False):
    """Accumulation, clipping, step and schedule as the Trainer does them, around create_reflora_optimizer."""
    model = tiny.lora(tiny.llama()).train()
    optimizer_cls, lr = (torch.optim.SGD, 3.0) if sgd else (torch.optim.AdamW, 0.01)
    optimizer = create_reflora_optimizer(model, optimizer_cls, lr=lr, weight_decay=0.0 if sgd else 0.1, **settings)
    tokens = torch.tensor(tiny.token_dataset(32)["input_ids"]).split(2)
    for _ in range(train_calls):
        optimizer.param_groups[0][STEP_KEY] = 0
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"] = lr
        schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
        for step in range(steps):
            for ids in tokens[step * accumulation : (step + 1) * accumulation]:
                context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
                with context:
                    loss = model(
                        ids, labels=ids, num_items_in_batch=torch.tensor(2 * (12 - UNCOUNTED_LABELS) * accumulation)
                    ).loss
                loss.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return tiny.trainable(model)


SGD = {"optim": "sgd", "learning_rate": 3.0, "weight_decay": 0.0}
CASES = {
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 3}, {"accumulation": 3}),
    "clipping": ({**SGD, "max_grad_norm": 0.01, "gradient_accumulation_steps": 2}, {"clip": 0.01, "accumulation": 2}),
    "no clipping": ({**SGD, "max_grad_norm": 0.0}, {"clip": None}),
    "checkpointing": ({"activation_checkpointing": True}, {}),
    "bf16": ({"bf16": True}, {"autocast": True}),
    "compile": ({"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}, {"steps": 2}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_trainer_takes_the_steps_of_create_reflora_optimizer(tmp_path, case, method):
    changes, hand = CASES[case]
    hand = {**hand, "sgd": "optim" in changes}
    trainer = make_trainer(tmp_path, [RefLoraCallback(**METHODS[method])], **changes)
    trainer.train()
    tiny.assert_same(tiny.trainable(trainer.model), run_by_hand(METHODS[method], **hand), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("method", ["reflora", "reflora_s precondition"])
def test_clipping_comes_before_preconditioning(tmp_path, method):
    """The norm that is logged is the one before; the norm after preconditioning is not what was clipped."""
    callback = RefLoraCallback(**METHODS[method])
    trainer = make_trainer(tmp_path, [callback], max_grad_norm=0.01)
    trainer.train()
    [*_, logged] = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert logged > 0.015
    assert abs(callback.metrics()["reflora/grad_norm"] - 0.01) > 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings",
    [{"warmup_steps": 2}, {"interval": 3}, {"smoothness": 10.0}, {"eps": 0.5, "dtype": "float64"}],
    ids=str,
)
def test_settings_reach_the_step(tmp_path, method, settings):
    settings = {**METHODS[method], **settings}
    trainer = make_trainer(tmp_path, [RefLoraCallback(**settings)])
    trainer.train()
    result = tiny.trainable(trainer.model)
    tiny.assert_same(result, run_by_hand(settings), rtol=1e-4, atol=2e-6)
    plain = run_by_hand(METHODS[method])
    if method == "reflora" or "eps" not in settings:
        assert not all(torch.allclose(value, plain[name], rtol=1e-4, atol=2e-6) for name, value in result.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_trainer_takes_the_same_steps(tmp_path, method, accumulation):
    """SFTTrainer computes its loss with a fused LM head, so equal to rounding."""
    callback = RefLoraCallback(**METHODS[method])
    changes = {"gradient_accumulation_steps": accumulation, "activation_checkpointing": True}
    trainer = make_trainer(tmp_path, [callback], SFTTrainer, **changes)
    trainer.train()
    expected = run_by_hand(METHODS[method], accumulation=accumulation)
    tiny.assert_same(tiny.trainable(trainer.model), expected, rtol=1e-3, atol=2e-5)
    assert callback.metrics().keys() >= {"reflora/balance_gap", "reflora/norm_A"}


def test_sft_trainer_wraps_the_model_itself(tmp_path):
    """peft_config=LoraConfig() on a plain model, chat data: the callback finds the pairs that SFTTrainer made."""
    trainer = SFTTrainer(
        model=tiny.llama(),
        args=SFTConfig(**tiny.arguments(tmp_path)),
        train_dataset=tiny.chat_dataset(),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[RefLoraCallback("reflora_s")],
    )
    trainer.train()
    factors = dict(trainer.model.named_parameters())
    norms = [(p.norm(), factors[n.replace("lora_A", "lora_B")].norm()) for n, p in factors.items() if "lora_A" in n]
    assert len(norms) == 14
    for a, b in norms:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_trainer_with_create_reflora_optimizer_is_the_same(tmp_path, method):
    model = tiny.lora(tiny.llama())
    optimizer = create_reflora_optimizer(model, torch.optim.AdamW, lr=0.01, weight_decay=0.1, **METHODS[method])
    trainer = make_trainer(tmp_path, [], model=model, optimizers=(optimizer, None))
    trainer.train()
    tiny.assert_same(tiny.trainable(model), run_by_hand(METHODS[method]), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_two_calls_of_train(tmp_path, method):
    """The second call counts its steps anew, as the Trainer does, and refactors once a step."""
    settings = {**METHODS[method], "warmup_steps": 1}
    trainer = make_trainer(tmp_path, [RefLoraCallback(**settings)])
    trainer.train()
    trainer.train()
    tiny.assert_same(tiny.trainable(trainer.model), run_by_hand(settings, train_calls=2), rtol=1e-4, atol=5e-6)


def test_an_optimizer_without_the_pairs_is_refused(tmp_path):
    """A Trainer keeps its optimizer, so a second train() would leave an adapter that became active later as it is."""
    model = tiny.lora(tiny.llama())
    model.add_adapter("other", model.peft_config["default"])
    trainer = make_trainer(tmp_path, [RefLoraCallback()], model=model)
    trainer.train()
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"4 trainable LoRA pairs in the optimizer, which has none.*a new Trainer"):
        trainer.train()
    make_trainer(tmp_path, [RefLoraCallback()], model=model).train()


def test_callback_and_optimizer_together_are_refused(tmp_path):
    model = tiny.lora(tiny.llama())
    optimizer = create_reflora_optimizer(model, torch.optim.AdamW, lr=0.01)
    trainer = make_trainer(tmp_path, [RefLoraCallback()], model=model, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"create_reflora_optimizer .* second time"):
        trainer.train()


def test_closure_optimizers_are_refused(tmp_path):
    model = tiny.lora(tiny.llama())
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])
    trainer = make_trainer(tmp_path, [RefLoraCallback()], model=model, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"LBFGS\.step needs a closure"):
        trainer.train()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (tiny.llama, "LlamaForCausalLM has no adapter"),
        (
            lambda: get_peft_model(tiny.llama(), VeraConfig(r=2, target_modules=["q_proj"])),
            r"layers of this model are others: peft\.tuners\.vera\.layer\.Linear\. Pass a LoraConfig",
        ),
        (
            lambda: get_peft_model(tiny.llama(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
            "adapter of this model is made by PromptTuningConfig. Pass a LoraConfig",
        ),
        (
            lambda: get_peft_model(tiny.llama(), LoraSbConfig(target_modules=["q_proj"], init_weights=True)),
            r"layers of this model are others: hf_reflora\.lora_sb\.layer\.Linear\. Pass a LoraConfig",
        ),
    ],
)
def test_models_without_pairs_are_refused_when_training_starts(tmp_path, make, match):
    trainer = make_trainer(tmp_path, [RefLoraCallback()], model=make())
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0


def as_backend(monkeypatch, kind: DistributedType, fsdp_version: int = 1) -> None:
    """Writes it into accelerate's real state, which chooses FSDP and Megatron-LM on accelerators only."""
    for state in (PartialState, AcceleratorState):  # accelerate writes to both
        monkeypatch.setitem(state._shared_state, "distributed_type", kind)
    if kind == DistributedType.FSDP:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=fsdp_version)
        monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)


@pytest.mark.parametrize("callback", [RefLoraCallback(), LoraSbCallback()], ids=["RefLoRA", "LoRA-SB"])
@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (DistributedType.FSDP, r"FSDP1, which keeps the factors in flat param.*Train with FSDP2: fsdp_ver"),
        (DistributedType.MEGATRON_LM, r"Megatron-LM, which takes .* Train with FSDP2, DeepSpeed or DDP"),
    ],
)
def test_backends_that_cannot_be_supported(tmp_path, monkeypatch, callback, kind, match):
    trainer = make_trainer(tmp_path, [callback])
    as_backend(monkeypatch, kind)
    with pytest.raises(ValueError, match=f"does not support {match}"):
        callback.check(trainer.args, trainer.model)
    with pytest.raises(ValueError, match=match):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


@pytest.mark.parametrize("callback", [RefLoraCallback(), LoraSbCallback()], ids=["RefLoRA", "LoRA-SB"])
def test_sagemakers_model_parallelism_is_refused(tmp_path, monkeypatch, callback):
    trainer = make_trainer(tmp_path, [callback])
    monkeypatch.setattr(backend, "is_sagemaker_mp_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"SageMaker's model parallelism\. Train with FSDP2 or DeepSpeed"):
        callback.check(trainer.args, trainer.model)


@pytest.mark.parametrize("kind", [DistributedType.MULTI_GPU, DistributedType.DEEPSPEED, DistributedType.FSDP], ids=str)
def test_backends_that_are_supported(tmp_path, monkeypatch, kind):
    trainer = make_trainer(tmp_path, [])
    as_backend(monkeypatch, kind, fsdp_version=2)
    RefLoraCallback().check(trainer.args, trainer.model)
    LoraSbCallback().check(trainer.args, trainer.model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_smoothness_with_a_warm_up_whose_first_rate_is_0(tmp_path, method, dtype):
    callback = RefLoraCallback(**METHODS[method], smoothness=10.0, dtype=dtype)
    trainer = make_trainer(tmp_path, [callback], max_steps=6, warmup_steps=3)
    before = tiny.trainable(trainer.model)
    trainer.train()
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert all(torch.as_tensor(value).isfinite().all() for value in moments)
    after = tiny.trainable(trainer.model)
    # Each B goes on learning; an infinite second moment would leave it to the weight decay.
    moved = [(after[n] - value).abs().max().item() for n, value in before.items() if "lora_B" in n]
    assert min(moved) > 1e-3


INSIDE = ["lomo", "adalomo", "galore_adamw_layerwise", "galore_adafactor_layerwise", "apollo_adamw_layerwise"]


@pytest.mark.parametrize("optim", INSIDE)
def test_optimizers_that_step_inside_the_backward_pass_are_refused(tmp_path, optim):
    """By name at construction: their packages need not be there."""
    match = f"optim={optim} takes its step inside the backward pass .*Use optim=adamw_torch"
    args = TrainingArguments(**tiny.arguments(tmp_path, optim=optim, optim_target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=match):
        RefLoraTrainer(model=tiny.lora(tiny.llama()), args=args, train_dataset=tiny.token_dataset())


@pytest.mark.parametrize("kind", ["LayerWiseDummyOptimizer", "Lomo"])
def test_such_optimizers_are_refused_in_person(tmp_path, kind):
    model = tiny.lora(tiny.llama())
    cls = LayerWiseDummyOptimizer if kind != "Lomo" else type("Lomo", (torch.optim.SGD,), {"fused_backward": None})
    optimizer = cls([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = make_trainer(tmp_path, [RefLoraCallback()], model=model, optimizers=(optimizer, schedule))
    with pytest.raises(ValueError, match=f"{kind} takes its step inside the backward pass"):
        trainer.train()
    with pytest.raises(ValueError, match=f"{kind} takes its step inside the backward pass"):
        create_reflora_optimizer(model, cls, lr=0.1)


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch", "sgd"])
@pytest.mark.parametrize("form", [None, "precondition"])
def test_optimizers_that_cannot_be_rescaled_are_refused_at_construction(tmp_path, optim, form):
    """By what an optimizer of the kind keeps after a step on a tensor of its own."""
    args = TrainingArguments(**tiny.arguments(tmp_path, optim=optim))
    callback = RefLoraCallback("reflora_s", form=form)
    arguments = {"args": args, "train_dataset": tiny.token_dataset(), "reflora": callback}
    if optim == "adafactor" and form is None:
        with pytest.raises(ValueError, match=r"Adafactor keeps 'exp_avg_sq_row', .*reflora_form: precondition"):
            RefLoraTrainer(model=tiny.lora(tiny.llama()), **arguments)
    else:
        RefLoraTrainer(model=tiny.lora(tiny.llama()), **arguments).train()


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_torchaos_quantized_optimizers_are_refused_for_rescaling(tmp_path, optim):
    args = TrainingArguments(**tiny.arguments(tmp_path, optim=optim))
    arguments = {"args": args, "train_dataset": tiny.token_dataset()}
    with pytest.raises(ValueError, match=r"AdamW\dbit keeps 'exp_avg' as a OptimState\dbit, which is quantized"):
        RefLoraTrainer(model=tiny.lora(tiny.llama()), reflora=RefLoraCallback("reflora_s"), **arguments)
    callback = RefLoraCallback("reflora_s", form="precondition")
    RefLoraTrainer(model=tiny.lora(tiny.llama()), reflora=callback, **arguments).train()


def test_closures_are_refused_at_construction_too(tmp_path):
    model = tiny.lora(tiny.llama())
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])
    args = TrainingArguments(**tiny.arguments(tmp_path))
    with pytest.raises(ValueError, match=r"LBFGS\.step needs a closure"):
        RefLoraTrainer(model=model, args=args, train_dataset=tiny.token_dataset(), optimizers=(optimizer, None))


@pytest.mark.parametrize("by", ["callbacks", "add_callback", "add_callback of ours"])
def test_two_callbacks_raise_when_training_starts(tmp_path, by):
    if by == "callbacks":
        trainer = make_trainer(tmp_path, [RefLoraCallback(), RefLoraCallback("reflora_s")])
    else:
        trainer = (
            tiny_trainer.build(tmp_path, RefLoraTrainer)
            if by == "add_callback of ours"
            else make_trainer(tmp_path, [RefLoraCallback()])
        )
        trainer.add_callback(RefLoraCallback())
    before = tiny.trainable(trainer.model)
    with pytest.raises(ValueError, match="two RefLoraCallbacks, which would refactor twice"):
        trainer.train()
    tiny.assert_same(tiny.trainable(trainer.model), before)


def test_one_callback_trains_again_after_an_error_and_after_another_has_taken_its_place(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, [RefLoraCallback(), Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stop)
    trainer.train()
    trainer.remove_callback(RefLoraCallback)
    trainer.add_callback(RefLoraCallback())
    trainer.train()
    assert trainer.state.global_step == 4


def test_wrong_settings_raise_at_construction():
    with pytest.raises(ValueError, match="method must be one of"):
        RefLoraCallback("lora")
    with pytest.raises(ValueError, match="warmup_steps must be at least 0"):
        RefLoraCallback(warmup_steps=-1)


def test_metrics_before_training_are_empty():
    assert RefLoraCallback().metrics() == {}


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_fp16_with_a_scaler_on_a_gpu(tmp_path, method):
    """The first steps overflow (scale 2¹⁶) or not: weights stay finite and the loss falls."""
    trainer = make_trainer(tmp_path, [RefLoraCallback(**METHODS[method])], use_cpu=False, fp16=True, max_steps=8)
    trainer.train()
    assert all(value.isfinite().all() for value in tiny.trainable(trainer.model).values())
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
