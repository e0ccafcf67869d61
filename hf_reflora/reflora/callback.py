"""RefLoRA as a TrainerCallback: for `transformers.Trainer` and every TRL trainer."""

import math
import weakref
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..distributed.backend import check_backend, is_deepspeed, unwrap_optimizer
from .factors import lora_layers, require_pairs
from .optimizer import STEP_KEY
from .optimizer_support import check_optim, check_optimizer, check_rescaling
from .settings import RefLora, shows_settings
from .step import choose_step
from .step_plain import PlainStep, held_pairs


def _optimizer_of(args: TrainingArguments, optimizer: Optimizer | None) -> tuple[type[Optimizer], dict[str, Any]]:
    """Class and arguments of the optimizer that is there, or else of the one that a Trainer will make for `args`."""
    if optimizer is not None:
        optimizer = unwrap_optimizer(optimizer)
        return type(optimizer), getattr(optimizer, "defaults", {})
    try:
        return Trainer.get_optimizer_cls_and_kwargs(args)
    except Exception:  # a package is missing, or it needs the model: training says so when it begins
        return SGD, {}


def _check_holds_pairs(optimizer: Optimizer, model: nn.Module) -> None:
    """Raises a ValueError if the optimizer would change none of the trainable pairs."""
    pairs = require_pairs(model)
    if not held_pairs(pairs, optimizer):
        raise ValueError(
            f"RefLoRA looked for the model's {len(pairs)} trainable LoRA pairs in the optimizer, which has none of "
            "them, so training would leave them as they are. A Trainer makes its optimizer once and keeps it when "
            "train() is called again: after set_adapter make a new Trainer."
        )


def _may_log(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the Trainer may log after the step that is being taken: its gradients are gone by then."""
    if args.logging_strategy != IntervalStrategy.STEPS:
        return args.logging_strategy == IntervalStrategy.EPOCH  # where an epoch ends is not known beforehand
    step = state.global_step + 1
    return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)


# The callback of each optimizer that trains. Both are held weakly: a trainer that is dropped leaves nothing behind.
_callbacks: "weakref.WeakKeyDictionary[Optimizer, weakref.ref[RefLoraCallback]]" = weakref.WeakKeyDictionary()


class RefLoraCallback(TrainerCallback):
    """Refactors the LoRA factors at each optimizer step (RefLoRA, https://huggingface.co/papers/2505.18877).

    It works with gradients that are accumulated, reduced over processes, unscaled and clipped: on one device, with
    DDP, with FSDP2, with gradient accumulation and checkpointing, bf16, fp16 and torch.compile. The pairs are PEFT's
    trainable lora_A/lora_B pairs of Linear, Embedding, Conv and `target_parameters` layers; all else is updated as
    usual. The logged `grad_norm` is the norm before preconditioning.

    DeepSpeed takes its step inside the backward pass. There S is computed when a step begins and multiplies each
    micro-batch's gradient. That is the same up to rounding, with one exception: `max_grad_norm` then bounds the
    preconditioned gradient, and `grad_norm` is its norm.

    The callback has no state to save: warm-up and interval follow `state.global_step`, so a resumed run continues
    exactly.

    It raises for FSDP1 (flat parameters), Megatron-LM and SageMaker's model parallelism, and for optimizers that step
    inside the backward pass or need a closure. Give a trainer one such callback, and not together with
    `create_reflora_optimizer`.

    Args:
        method: `"reflora"` (Theorem 3) or `"reflora_s"` (Theorem 5).
        settings: The other settings of `hf_reflora.RefLora` by name: `form`, `eps`, `dtype`, `warmup_steps`,
            `interval`, `smoothness`, `diagnostics`.

    Attributes:
        settings: The `RefLora` made of them.

    Raises:
        ValueError: at construction for a value out of range; when training starts, if there is no trainable LoRA pair,
            the optimizer has none of the pairs, needs a closure or steps inside the backward pass, the trainer has a
            second RefLoraCallback, or the backend is not supported.
            `RefLoraTrainer`, `RefLoraSFTTrainer` and `RefLoraDPOTrainer` raise the latter at construction.
        NotImplementedError: when training starts, for RefLoRA-S as rescaling with 16-bit factors under ZeRO-0 (use
            `form="precondition"`), and for factors that are sharded otherwise than by FSDP2's rows.

    Example:
        >>> trainer = SFTTrainer(..., peft_config=LoraConfig(), callbacks=[RefLoraCallback(warmup_steps=100)])
    """

    @shows_settings
    def __init__(self, method: str = "reflora", **settings: Any):
        self.settings = RefLora(method, **settings)
        self._step: PlainStep | None = None

    def check(self, args: TrainingArguments, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Raises where this callback could not work, see the class."""
        check_backend("RefLoRA")
        check_optim(str(getattr(args.optim, "value", args.optim)))
        require_pairs(model)
        if self.settings.rescales:
            check_rescaling(*_optimizer_of(args, optimizer), next(model.parameters()).device)
        if optimizer is not None:
            # accelerate's wrapper has a step with an optional closure, whatever the optimizer inside needs.
            check_optimizer(type(unwrap_optimizer(optimizer)))
            if any(STEP_KEY in group for group in optimizer.param_groups):
                raise ValueError(
                    "The optimizer comes from create_reflora_optimizer and RefLoraCallback would refactor a second "
                    "time. Use one of the two."
                )

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.check(args, model, optimizer)
        if not is_deepspeed():  # which puts partitions of its own into the optimizer
            _check_holds_pairs(unwrap_optimizer(optimizer), model)
        self._claim(unwrap_optimizer(optimizer))
        # The step object is chosen here and not at construction: FSDP2 and DeepSpeed replace the parameters and their
        # storage when the Trainer prepares the model, which comes shortly before this event.
        if self._step is not None:
            self._step.close()  # an earlier train() may have ended with an error, before on_train_end
        self._step = choose_step(self.settings, lora_layers(model))

    def _claim(self, optimizer: Optimizer) -> None:
        # A callback does not see the trainer's other callbacks, but they get the same optimizer. An entry that a
        # training left behind which ended with an error is this callback's own, or that of one that is gone.
        other = _callbacks.get(optimizer, lambda: None)()
        if other is not None and other is not self:
            raise ValueError(
                "This trainer has two RefLoraCallbacks, which would refactor twice. Give it one: RefLoraTrainer, "
                "RefLoraSFTTrainer and RefLoraDPOTrainer add it themselves and take another one as reflora=..."
            )
        _callbacks[optimizer] = weakref.ref(self)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self._step.begin(state.global_step, unwrap_optimizer(optimizer))

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # The gradients are accumulated, averaged over processes, unscaled and clipped by now. After an overflow in
        # fp16 they are not finite and this event comes all the same; the GradScaler then skips the step.
        measure_norm = self.settings.diagnostics and _may_log(args, state)
        self._step.before_optimizer(state.global_step, unwrap_optimizer(optimizer), measure_norm=measure_norm)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # The Trainer counts the step later, so `state.global_step` is still the index of the step just taken.
        self._step.after_optimizer(state.global_step, unwrap_optimizer(optimizer))

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        self._step.close()
        _callbacks.pop(unwrap_optimizer(optimizer), None)

    def metrics(self) -> dict[str, float]:
        """What `RefLoraTrainer` logs; with another trainer, call it where you log, on all processes.

        Returns:
            By names that begin with "reflora/": means over the pairs as they are now, before the next refactoring
            (balance_gap, balance_residual, norm_A, norm_B, fallback; medians of cond_P and cond_Q; see
            `hf_reflora.reflora.diagnose.diagnose`), and grad_norm, the norm of the LoRA gradients after the
            preconditioning of the last step, if that is one after which the Trainer logs. What does not exist yet,
            or not under DeepSpeed, is left out. Nothing with `diagnostics=False`.
        """
        if self._step is None or not self.settings.diagnostics:
            return {}
        # .item() waits for the device: this is called at logging steps only.
        metrics = {}
        for name, values in self._step.diagnose().items():
            values = values[values.isfinite()]
            if len(values):
                metrics[name] = (values.median() if name.startswith("cond") else values.mean()).item()
        if self._step.grad_norm is not None:
            metrics["grad_norm"] = self._step.grad_norm.item()
        return {f"reflora/{name}": value for name, value in metrics.items() if math.isfinite(value)}
