"""LoRA-SB's initialization inside a Trainer, on samples of its own training data."""

import math
from typing import Any

from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset
from transformers import TrainerCallback
from transformers.utils import logging

from ..distributed.backend import check_backend, is_deepspeed, unwrap_optimizer
from ..distributed.parameters import check_master_copies
from .gradients import preserve_random_states
from .initialize import LossFunction, initialize_lora_sb_weights
from .model import restore_float32
from .samples import draw_samples
from .subspace import UPDATES
from .targets import adapter_layers, is_initialized, missing_peft_model, trained_parameter


logger = logging.get_logger(__name__)


class LoraSbCallback(TrainerCallback):
    """Initializes the adapter with LoRA-SB when training starts (https://huggingface.co/papers/2411.19557).

    It draws samples from the trainer's training data, passes them through the trainer's collator (so that packing,
    completion-only loss, gradient checkpointing and DDP are as in training) and calls `initialize_lora_sb_weights`. It
    works for `LoraSbConfig` adapters and for ordinary LoRA ones, whose factors then have full rank and are balanced,
    so that a `RefLoraCallback` works from the first step.

    It leaves the adapter alone in a resumed run, and if it is initialized (`init_weights` other than "lora_sb"),
    loaded or trained already; but it makes R float32 again where TRL has cast it (quantized models). FSDP1,
    Megatron-LM and SageMaker's model parallelism are not supported: use FSDP2, DeepSpeed or DDP. Under DDP set
    `ddp_broadcast_buffers=False`, which saves sending B and A at every step: they are equal on all processes.

    Args:
        num_samples: Number of samples, in all processes together. Default: 0.1 % of the training data, at least 25. Of
            a stream they are the first ones, and training has them, too; a stream that can be read only once must be
            read without workers (`dataloader_num_workers=0`) for that.
        eta: η, the step size of the update. Default: the first learning rate above zero in the trainer's schedule
            (with warm-up, the peak divided by the number of warm-up steps; without, the peak).
        update: `"sign"` (for Adam and its relatives) or `"gradient"` (for SGD). Default: what suits the trainer's
            optimizer.
        forward_fn: As in `initialize_lora_sb_weights`; needed where the trainer's loss is not the model's own. A
            `compute_loss_func` given to the trainer is not visible here and must be given here, too.
        start_at_base, passes, adapter_name: As in `initialize_lora_sb_weights`.

    Raises:
        ValueError: at construction for a wrong value. When training starts, if `update` or `eta` is not given and
            cannot be told from the optimizer and its schedule; if the loss is not the model's own (label smoothing,
            `loss_type`) and `forward_fn` is not given; if the data are a stream and `num_samples` is not given; if the
            backend is not supported; if the adapter is frozen, or the optimizer does not have it; or if
            `initialize_lora_sb_weights` raises.

    Example:
        >>> trainer = SFTTrainer(..., peft_config=LoraSbConfig(r=64), callbacks=[LoraSbCallback()])
    """

    def __init__(
        self,
        *,
        num_samples: int | None = None,
        eta: float | None = None,
        update: str | None = None,
        start_at_base: bool = False,
        passes: int | None = None,
        forward_fn: LossFunction | None = None,
        adapter_name: str = "default",
    ):
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
        if eta is not None and not (math.isfinite(eta) and eta > 0):
            raise ValueError(f"eta must be a positive number, got {eta}.")
        if update is not None and update not in UPDATES:
            raise ValueError(f"update must be one of {UPDATES}, got {update!r}.")
        if passes is not None and passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}.")
        self.num_samples, self.eta, self.update = num_samples, eta, update
        self.start_at_base, self.passes, self.forward_fn = start_at_base, passes, forward_fn
        self.adapter_name = adapter_name

    def check(self, args, model: nn.Module) -> None:
        """Raises a ValueError where this callback could not initialize the adapter: see the class."""
        check_backend("LoRA-SB's initialization")
        if not isinstance(model, PeftModel):
            raise ValueError(f"LoraSbCallback initializes the adapter of a PeftModel; {missing_peft_model(model)}")
        layers = adapter_layers(model, self.adapter_name)
        if not any(trained_parameter(layer, self.adapter_name).requires_grad for layer in layers.values()):
            raise ValueError(
                f"The adapter {self.adapter_name!r} is frozen, so training would leave it as it is. Load it with "
                "PeftModel.from_pretrained(..., is_trainable=True), or call model.set_adapter."
            )
        loss_type = getattr(args, "loss_type", "nll")  # an argument of TRL's; nll and chunked_nll are the same loss
        if self.forward_fn is None and (args.label_smoothing_factor or loss_type not in ("nll", "chunked_nll")):
            raise ValueError(
                f"The loss is not the model's own (loss_type={loss_type!r}, label_smoothing_factor="
                f"{args.label_smoothing_factor}). Give LoraSbCallback(forward_fn=...), which computes it."
            )

    def _check_optimizer(self, model: PeftModel, optimizer: Optimizer) -> None:
        layers = adapter_layers(model, self.adapter_name).values()
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        # DeepSpeed puts partitions of its own into the optimizer.
        if not is_deepspeed() and held.isdisjoint(id(trained_parameter(layer, self.adapter_name)) for layer in layers):
            raise ValueError(
                f"The optimizer has no parameter of the adapter {self.adapter_name!r}, so training would leave it as "
                "it is. A Trainer makes its optimizer once and keeps it when train() is called again: after "
                "set_adapter make a new Trainer."
            )

    def on_init_end(self, args, state, control, model=None, **kwargs):
        # TRL casts the trainable parameters of quantized models to bfloat16. Here no optimizer has been made yet.
        restore_float32(model)

    def on_train_begin(
        self, args, state, control, model=None, optimizer=None, lr_scheduler=None, train_dataloader=None, **kwargs
    ):
        self.check(args, model)
        self._check_optimizer(model, unwrap_optimizer(optimizer))
        # A callback that was added after the trainer was made missed on_init_end. With several processes it is too
        # late by now: the backend has made buffers or copies of the parameters, in their dtype.
        if args.world_size == 1:
            restore_float32(model)
        if state.global_step > 0 or is_initialized(model, self.adapter_name):
            logger.info(f"Adapter {self.adapter_name!r} is initialized already; LoRA-SB's initialization is skipped.")
            return
        if is_deepspeed():
            # DeepSpeed may step on float32 copies of the factors. If those could not be written, it is better to raise
            # before the gradients are computed.
            trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            check_master_copies(trainable, "LoRA-SB's initialization")
        with preserve_random_states():  # the dataset or the collator may draw numbers
            initialize_lora_sb_weights(
                model,
                self._batches(args, state.train_batch_size, train_dataloader),
                eta=first_learning_rate(optimizer, lr_scheduler) if self.eta is None else self.eta,
                update=update_of(optimizer) if self.update is None else self.update,
                forward_fn=self.forward_fn,
                adapter_name=self.adapter_name,
                start_at_base=self.start_at_base,
                passes=self.passes,
                show_progress_bar=not args.disable_tqdm,
            )

    def _batches(self, args, batch_size: int, train_dataloader) -> DataLoader:
        """This process's share of the samples, drawn with `args.seed` and collated as in training."""
        dataset, chosen = draw_samples(train_dataloader, self.num_samples, args.seed)
        # A dataloader of its own, since reading the trainer's would advance the trainer's sampler.
        share = chosen[args.process_index :: args.world_size]
        return DataLoader(Subset(dataset, share), batch_size=batch_size, collate_fn=train_dataloader.collate_fn)


def first_learning_rate(optimizer: Optimizer, lr_scheduler: Any) -> float:
    """The first learning rate above zero that the optimizer will step with.

    Raises:
        ValueError: if the current one is 0 and the schedule is not a `LambdaLR`, which can be asked for later steps
            without taking them.
    """
    rate = unwrap_optimizer(optimizer).param_groups[0]["lr"]
    if rate > 0:
        return float(rate)
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
    if isinstance(scheduler, LambdaLR):
        for step in range(1, 10_000):
            rate = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step)
            if rate > 0:
                return rate
    raise ValueError(
        f"The first learning rate is 0 and {type(scheduler).__name__} does not tell when it rises. Give "
        "LoraSbCallback(eta=...), the first learning rate above 0; in a YAML file lorasb_eta."
    )


def update_of(optimizer: Optimizer) -> str:
    """Which update the optimizer's first step is: `"sign"` for Adam, its relatives and Lion, `"gradient"` for SGD.

    Raises:
        ValueError: for other optimizers.
    """
    # By the names of the class and its parents, so that the optimizers of other libraries count, such as those of
    # bitsandbytes and DeepSpeed, which need not be installed.
    names = [cls.__name__ for cls in type(unwrap_optimizer(optimizer)).__mro__]
    if any(name.startswith(("Adam", "Lion", "PagedAdam", "PagedLion")) for name in names):
        return "sign"
    if "SGD" in names:
        return "gradient"
    raise ValueError(
        f'The first step of {names[0]} is not known. Give LoraSbCallback(update="sign") if it is near the sign of the '
        'gradient, as that of Adam is, or update="gradient" if it is proportional to the gradient; in a YAML file '
        "lorasb_update: sign or gradient."
    )
