"""LoRA-SB's initialization inside a Trainer, on the batches it is going to train on."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import TrainerCallback
from transformers.utils import logging

from ..distributed.backend import check_backend, is_deepspeed, unwrap_optimizer
from ..distributed.parameters import check_master_copies
from .gradients import random_states_kept
from .initialize import adapter_layers, initialize_lora_sb_weights, is_initialized
from .model import restore_float32
from .subspace import UPDATES


logger = logging.get_logger(__name__)


class LoraSbCallback(TrainerCallback):
    """Initializes the adapter when training starts: LoRA-SB (https://huggingface.co/papers/2411.19557).

    Takes samples of the trainer's training data through its collator (packing, completion-only loss, gradient
    checkpointing and DDP as in training) and calls `initialize_lora_sb_weights`. For `LoraSbConfig` adapters, and for
    ordinary LoRA, which then starts full of rank and balanced, so that a `RefLoraCallback` works from the first step.

    A resumed run, and an adapter that is initialized (`init_weights` other than "lora_sb"), loaded or trained already,
    are left alone; but R is made float32 again where TRL has cast it (quantized models). Not for FSDP1, Megatron-LM
    and SageMaker's model parallelism. Under DDP set `ddp_broadcast_buffers=False`: B and A are equal everywhere
    anyway.

    Args:
        num_samples: Samples in all processes together. Default: 0.1 % of the training data, at least 25.
        eta: η, the step size of the update. Default: the first learning rate above zero of the trainer's schedule
            (with warm-up: the peak divided by the warm-up steps; without: the peak).
        update: `"sign"` (Adam and its kin) or `"gradient"` (SGD). Default: by the trainer's optimizer.
        forward_fn: As in `initialize_lora_sb_weights`; needed where the trainer's loss is not the model's own. The
            `compute_loss_func` of a stock trainer cannot be seen from here.
        start_at_base, passes, adapter_name: As in `initialize_lora_sb_weights`.

    Raises:
        ValueError: at construction for a wrong value; when training starts, if the optimizer or its schedule does not
            tell `update` or `eta`, the loss is not the model's own (label smoothing, `loss_type`; not with
            `forward_fn`), the length of a streamed dataset is unknown and `num_samples` not given, the backend is not
            supported, or `initialize_lora_sb_weights` raises.

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
        forward_fn: Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Tensor | int]] | None = None,
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
        """Raises where this callback could not work: see the class."""
        check_backend("LoRA-SB's initialization")
        if not isinstance(model, PeftModel):
            raise ValueError(f"LoraSbCallback needs a PeftModel (peft_config=...), got {type(model).__name__}.")
        adapter_layers(model, self.adapter_name)
        loss_type = getattr(args, "loss_type", "nll")
        if self.forward_fn is None and (args.label_smoothing_factor or loss_type not in ("nll", "chunked_nll")):
            raise ValueError(
                f"The loss is not the model's own (loss_type={loss_type!r}, label_smoothing_factor="
                f"{args.label_smoothing_factor}). Give LoraSbCallback(forward_fn=...), which computes it."
            )

    def on_init_end(self, args, state, control, model=None, **kwargs):
        # TRL casts trainable parameters of quantized models to bfloat16; no optimizer has seen them yet.
        restore_float32(model)

    def on_train_begin(
        self, args, state, control, model=None, optimizer=None, lr_scheduler=None, train_dataloader=None, **kwargs
    ):
        self.check(args, model)
        if args.world_size == 1:
            restore_float32(model)  # a callback added after the trainer was made missed on_init_end
        if state.global_step > 0 or is_initialized(model, self.adapter_name):
            logger.info(f"Adapter {self.adapter_name!r} is initialized already; LoRA-SB's initialization is skipped.")
            return
        if is_deepspeed():
            trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            check_master_copies(trainable, "LoRA-SB's initialization")
        with random_states_kept():  # samples may be drawn at random
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
        """This process's share of the samples: drawn with `args.seed`, collated as in training."""
        dataset = train_dataloader.dataset
        if isinstance(dataset, IterableDataset):
            if self.num_samples is None:
                raise ValueError(
                    "The training data are a stream of unknown length. Give LoraSbCallback(num_samples=...)."
                )
            dataset = list(itertools.islice(dataset, self.num_samples))
            chosen = range(len(dataset))
        else:
            wanted = max(25, math.ceil(len(dataset) / 1000)) if self.num_samples is None else self.num_samples
            generator = torch.Generator().manual_seed(args.seed)
            chosen = torch.randperm(len(dataset), generator=generator)[:wanted].tolist()
        share = chosen[args.process_index :: args.world_size]
        return DataLoader(Subset(dataset, share), batch_size=batch_size, collate_fn=train_dataloader.collate_fn)


def first_learning_rate(optimizer: Optimizer, lr_scheduler: Any) -> float:
    """The learning rate of the first optimizer step that has one above zero.

    Raises:
        ValueError: if it is 0 and the schedule does not tell the next ones (a `LambdaLR` does).
    """
    rate = unwrap_optimizer(optimizer).param_groups[0]["lr"]
    if rate > 0:
        return float(rate)
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # out of accelerate's wrapper
    if isinstance(scheduler, LambdaLR):
        for step in range(1, 10_000):
            rate = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](step)
            if rate > 0:
                return rate
    raise ValueError(
        f"The first learning rate is 0 and {type(scheduler).__name__} does not tell when it rises. Give "
        "LoraSbCallback(eta=...), the first learning rate above 0."
    )


def update_of(optimizer: Optimizer) -> str:
    """What the optimizer's first step takes of the gradient: `"sign"` for Adam's kin and Lion, `"gradient"` for SGD.

    Raises:
        ValueError: for other optimizers.
    """
    names = [cls.__name__ for cls in type(unwrap_optimizer(optimizer)).__mro__]
    if any(name.startswith(("Adam", "Lion", "PagedAdam", "PagedLion")) for name in names):
        return "sign"
    if "SGD" in names:
        return "gradient"
    raise ValueError(
        f'The first step of {names[0]} is not known. Give LoraSbCallback(update="sign") if it is near the sign of the '
        'gradient (as of Adam), or update="gradient".'
    )
