"""RefLoRA as a TrainerCallback: for `transformers.Trainer` and every TRL trainer."""

import math

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments

from ..distributed.backend import check_backend, is_deepspeed, unwrap_optimizer
from ..distributed.parameters import check_master_copies, gather_parameters
from .deepspeed import GradientHooks, rescale_
from .factors import lora_layers, require_pairs, trainable_pairs
from .optimizer import STEP_KEY
from .step import RefLora, check_optim, check_optimizer


class RefLoraCallback(TrainerCallback):
    """Refactors the LoRA factors at each optimizer step (RefLoRA, https://huggingface.co/papers/2505.18877).

    Works with gradients that are accumulated, reduced over processes, unscaled and clipped: on one device, with DDP,
    with FSDP2, with gradient accumulation and checkpointing, bf16, fp16 and torch.compile. The pairs are PEFT's
    trainable lora_A/lora_B pairs of Linear, Embedding, Conv and `target_parameters` layers; all else is updated as
    usual. The logged `grad_norm` is the norm before preconditioning.

    DeepSpeed takes its step inside the backward pass. There S is computed when a step begins and multiplies each
    micro-batch's gradient, which is the same but for rounding, and for clipping: `max_grad_norm` then bounds the
    preconditioned gradient, and `grad_norm` is its norm.

    It has no state: warm-up and interval follow `state.global_step`, so a resumed run continues exactly.

    Not for FSDP1 (flat parameters), Megatron-LM and SageMaker's model parallelism, nor for optimizers that step
    inside the backward pass or need a closure: there it raises. Give a trainer one such callback, and not together
    with `create_reflora_optimizer`.

    Args:
        method: `"reflora"` (Theorem 3) or `"reflora_s"` (Theorem 5).
        form, eps, dtype, warmup_steps, interval, smoothness: As in `hf_reflora.RefLora`.

    Raises:
        ValueError: at construction for a value out of range; when training starts, if there is no trainable LoRA pair,
            the optimizer needs a closure or steps inside the backward pass, or the backend is not supported.
            `RefLoraTrainer`, `RefLoraSFTTrainer` and `RefLoraDPOTrainer` raise the latter at construction.
        NotImplementedError: when training starts, for RefLoRA-S as rescaling with 16-bit factors under ZeRO-0 (use
            `form="precondition"`), and for factors that are sharded otherwise than by FSDP2's rows.

    Example:
        >>> trainer = SFTTrainer(..., peft_config=LoraConfig(), callbacks=[RefLoraCallback(warmup_steps=100)])
    """

    def __init__(
        self,
        method: str = "reflora",
        *,
        form: str | None = None,
        eps: float | None = None,
        dtype: str = "float32",
        warmup_steps: int = 0,
        interval: int = 1,
        smoothness: float | None = None,
    ):
        self.reflora = RefLora(method, form, eps, dtype, warmup_steps, interval, smoothness)
        self._layers = {}
        self._grad_norm: Tensor | None = None
        self._hooks = GradientHooks(self.reflora)
        self._deepspeed = False

    def check(self, args: TrainingArguments, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Raises where this callback could not work: see the class."""
        check_backend("RefLoRA")
        check_optim(str(getattr(args.optim, "value", args.optim)))
        require_pairs(model)
        if optimizer is not None:
            check_optimizer(type(unwrap_optimizer(optimizer)))
            if any(STEP_KEY in group for group in optimizer.param_groups):
                raise ValueError(
                    "The optimizer comes from create_reflora_optimizer and RefLoraCallback would refactor a second "
                    "time. Use one of the two."
                )

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.check(args, model, optimizer)
        self._layers = lora_layers(model)
        self._deepspeed = is_deepspeed()
        if self._deepspeed:
            pairs = trainable_pairs(self._layers)
            if self.reflora.rescales:
                check_master_copies(model, "RefLoRA-S as rescaling (not form='precondition')")
            self._hooks.attach([] if self.reflora.rescales else pairs)

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if self._deepspeed and not self.reflora.rescales:
            pairs = trainable_pairs(self._layers) if self.reflora.due(state.global_step) else []
            self._hooks.freeze(pairs, unwrap_optimizer(optimizer))

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if not self._deepspeed and not self.reflora.rescales and self.reflora.due(state.global_step):
            self._grad_norm = self.reflora.before_optimizer(trainable_pairs(self._layers), unwrap_optimizer(optimizer))

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.reflora.rescales and self.reflora.due(state.global_step):
            pairs, optimizer = trainable_pairs(self._layers), unwrap_optimizer(optimizer)
            if self._deepspeed:
                rescale_(self.reflora, pairs, optimizer)
            else:
                self.reflora.after_optimizer(pairs, optimizer)

    def on_train_end(self, args, state, control, **kwargs):
        self._hooks.attach([])

    def metrics(self) -> dict[str, float]:
        """What `RefLoraTrainer` logs; for other trainers, call it where you log, on all processes.

        Means over the pairs as they are now, before the next refactoring (balance_gap, balance_residual, norm_A,
        norm_B, fallback, and medians of cond_P and cond_Q: see `hf_reflora.reflora.refactor.diagnose`), and
        `grad_norm`, the norm of the LoRA gradients after the last preconditioning. What does not exist yet, or not
        under DeepSpeed, is left out.
        """
        pairs = trainable_pairs(self._layers)
        values = {}
        with gather_parameters(factor for pair in pairs for factor in (pair.A, pair.B)):
            found = self.reflora.diagnose(pairs) if pairs else {}
        for name, value in found.items():
            value = value[value.isfinite()]
            if len(value):
                values[name] = (value.median() if name.startswith("cond") else value.mean()).item()
        if self._grad_norm is not None:
            values["grad_norm"] = self._grad_norm.item()
        return {f"reflora/{name}": value for name, value in values.items() if math.isfinite(value)}
