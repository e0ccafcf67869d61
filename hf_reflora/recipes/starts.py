"""PEFT's initializations of a LoRA as the recipes' `init`: random, from the base model's weights, or from data."""

import inspect
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import peft
import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

from ..distributed.backend import backend_name, is_replicated
from ..distributed.parameters import adapter_state_dict, has_sharded_parameters
from ..lora_sb.gradients import preserve_random_states
from ..lora_sb.initialize import mean_loss
from ..lora_sb.samples import draw_samples
from ..report.changed_base import doubled, joined, parted
from ..report.weights import read_weights


if TYPE_CHECKING:
    from .options import Options

RANDOM = ("gaussian", "orthogonal")
FROM_DATA = ("eva", "corda", "lora_ga")
CHANGE_BASE = ("pissa", "olora", "corda", "lora_ga")
# pissa_niter_4 is PiSSA with a randomized SVD.
NAMES = re.compile(r"gaussian|orthogonal|pissa(_niter_\d+)?|olora|eva|corda|lora_ga")
# Forward passes after which EVA counts as not converging. PEFT itself would repeat the samples for ever.
EVA_PASSES = 1000


def is_name(init: str) -> bool:
    """Whether PEFT's LoraConfig has an initialization of this name that the recipes support."""
    return NAMES.fullmatch(init) is not None


def changes_base(init: str) -> bool:
    """Whether the start is subtracted from the base model's weights: see `hf_reflora.report.changed_base`."""
    return is_name(init) and init.startswith(CHANGE_BASE)


def check(options: "Options") -> None:
    """Raises a ValueError where PEFT's initialization and another option exclude each other."""
    init, model = options.recipe.init, options.model
    if not is_name(init):
        return
    if model.lora_target_parameters:
        raise ValueError(f"init {init} is for layers; leave lora_target_parameters out, or take init default.")
    if (model.load_in_4bit or model.load_in_8bit) and init not in ("gaussian", "eva"):
        raise ValueError(
            f"init {init} needs the base model's weights in 16 or 32 bits. With load_in_4bit or load_in_8bit take "
            "init default, gaussian, eva or lora_sb."
        )
    if model.use_dora and changes_base(init):
        raise ValueError(
            f"init {init} changes the base model's weights, and a DoRA cannot be converted for the unchanged ones. "
            "Leave use_dora out, or take init default, gaussian, orthogonal or eva."
        )
    training = options.training
    loss_type = getattr(training, "loss_type", "nll")  # TRL's; nll and chunked_nll are the same loss
    if init == "lora_ga" and (training.label_smoothing_factor or loss_type not in ("nll", "chunked_nll")):
        raise ValueError(
            f"init lora_ga takes the gradient of the model's own loss, which is not that of loss_type {loss_type!r} "
            f"with label_smoothing_factor {training.label_smoothing_factor}. Leave these out, or take another init."
        )


def apply_start(trainer: Trainer, init: str, samples: int | None = None) -> None:
    """Initializes the adapter of a trainer that has not trained yet, by PEFT's functions.

    Every process computes the same start, from the same samples and random state. Where the start changes the base
    model's weights, `trainer` must be of a class that `converting` has made.

    Args:
        init: A name for which `is_name` holds, but none of `RANDOM`, which PEFT applies when it makes the adapter.
        samples: Number of training samples for EVA, CorDA and LoRA-GA. Default: a thousandth of the data, at least 25.

    Raises:
        ValueError: under FSDP and DeepSpeed, for layers that PEFT cannot initialize this way, or too few samples.
    """
    if not is_replicated() or has_sharded_parameters(trainer.model):
        raise ValueError(
            f"init {init} needs each layer's weights and inputs on one device, and PEFT computes it only there; this "
            f"run's backend is {backend_name()}. Take one process or DDP, or init default, gaussian or lora_sb."
        )
    model = trainer.model
    config = model.peft_config["default"]
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer) and "default" in m.r}
    for name, layer in layers.items():
        _check_layer(name, layer, init)
    dtype = next(p.dtype for name, p in model.named_parameters() if ".lora_A." in name)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with preserve_random_states(devices):
        torch.manual_seed(trainer.args.seed)
        if init == "eva":
            _apply_eva(model, config, _batches(trainer, samples))
        else:
            _apply_changing_base(trainer, config, layers, init, samples)
    # PEFT makes new factors in the dtype of the base model's weights. The trainer has chosen theirs.
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            parameter.data = parameter.data.to(dtype)
    if changes_base(init):
        tensors = adapter_state_dict(model)
        trainer.run_record.start = {name: t for name, t in tensors.items() if ".lora_A." in name or ".lora_B." in name}


def _batches(trainer: Trainer, samples: int | None, size: int | None = None) -> DataLoader:
    """Samples of the trainer's data, as its collator prepares them, the same ones for all processes."""
    dataloader = trainer.get_train_dataloader()
    dataset, chosen = draw_samples(dataloader, samples, trainer.args.seed)
    size = size or trainer.args.per_device_train_batch_size
    return DataLoader(Subset(dataset, chosen), batch_size=size, collate_fn=dataloader.collate_fn)


def _apply_eva(model: PeftModel, config: LoraConfig, batches: DataLoader) -> None:
    from peft import EvaConfig, initialize_lora_eva_weights
    from peft.tuners.lora.eva import prepare_model_inputs_fn_language_modeling

    config.init_lora_weights, config.eva_config = "eva", EvaConfig()
    loader = [dict(batch) for batch in batches]  # PEFT accepts no BatchEncoding, and reads the batches several times

    def positions(inputs: dict[str, Tensor], config: LoraConfig) -> Tensor:
        # A class is a label of the row and no mask of its tokens.
        if "labels" in inputs and inputs["labels"].shape != inputs["input_ids"].shape:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        return prepare_model_inputs_fn_language_modeling(inputs, config)

    needed = round(config.r * config.eva_config.rho)
    # PEFT skips smaller batches, and would wait for a larger one for ever.
    largest = max(len(positions(batch, config)) for batch in loader)
    if largest < needed:
        raise ValueError(
            f"EVA needs batches of at least {needed} tokens ({config.eva_config.rho:g} times lora_r), and the largest "
            f"of these has {largest}. Enlarge per_device_train_batch_size, or lower lora_r."
        )
    passes = iter(range(EVA_PASSES))

    def forward(model: nn.Module, inputs: dict[str, Any]) -> None:
        if next(passes, None) is None:
            raise ValueError(
                f"EVA's singular vectors have not converged after {EVA_PASSES} batches. Give more init_samples, "
                "larger batches or a lower lora_r."
            )
        model(**_inputs(model, inputs))

    # All processes have the same samples, so that PEFT need not gather what the layers get.
    initialize_lora_eva_weights(
        model,
        loader,
        forward_fn=forward,
        prepare_model_inputs_fn=positions,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )


def _apply_changing_base(
    trainer: Trainer, config: LoraConfig, layers: dict[str, LoraLayer], init: str, samples: int | None
) -> None:
    model = trainer.model
    # The adapter is there already. PEFT's functions for a model without one find its base layers by their full names.
    bases = [f"{name}.base_layer" for name in layers]
    if init == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        batches = _batches(trainer, samples, size=1)  # PEFT's covariance is of one row without padding

        def run_model() -> None:
            for batch in batches:
                model(**_inputs(model, send_to_device(batch, model.device)))

        with model.disable_adapter():
            preprocess_corda(
                model,
                replace(config, target_modules=bases, init_lora_weights=init, corda_config=CordaConfig()),
                run_model=run_model,
            )
    elif init == "lora_ga":
        try:
            from peft import LoraGAConfig
            from peft.tuners.lora.loraga import preprocess_loraga
        except ImportError as error:
            raise ImportError(f"PEFT {peft.__version__} has no LoRA-GA; pip install -U peft") from error
        ga_config, batches = LoraGAConfig(), _batches(trainer, samples)

        def train_step() -> None:
            with warnings.catch_warnings():
                # PEFT counts the backward passes by hooks, also of layers whose inputs need no gradient.
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                for batch in batches:
                    mean_loss(model, send_to_device(batch, model.device))[0].backward()

        with model.disable_adapter():
            preprocess_loraga(
                model,
                replace(config, target_modules=bases, init_lora_weights=init, lora_ga_config=ga_config),
                train_step,
            )
    with torch.no_grad():
        for layer in layers.values():
            if init == "lora_ga":
                layer.lora_ga_init("default", ga_config)
            elif init == "olora":
                layer.olora_init("default")
            else:
                (layer.corda_init if init == "corda" else layer.pissa_init)("default", init)


def _check_layer(name: str, layer: LoraLayer, init: str) -> None:
    base = layer.get_base_layer()
    # PEFT's OLoRA takes the weights of a Conv1D, which are transposed, as they are.
    if not isinstance(base, nn.Linear if init == "olora" else nn.Linear | Conv1D):
        raise ValueError(f"{name} is a {type(base).__name__}, which init {init} cannot start. Leave it out.")
    rank = layer.r["default"] * (2 if init == "lora_ga" else 1)
    if rank > min(layer.in_features, layer.out_features):
        raise ValueError(
            f"init {init} with lora_r {layer.r['default']} takes {rank} singular vectors, and {name} is "
            f"{layer.out_features} x {layer.in_features}. Lower lora_r, or leave the layer out."
        )


def _inputs(model: PeftModel, batch: dict[str, Any]) -> dict[str, Any]:
    """What the base model's forward takes of a batch, without the labels."""
    taken = inspect.signature(model.get_base_model().forward).parameters
    return {name: value for name, value in batch.items() if name in taken and name != "labels"}


def converting(trainer: type[Trainer]) -> type[Trainer]:
    """`trainer`, saving adapters whose start has changed the base model as ordinary LoRAs of the unchanged one.

    Its checkpoints are such LoRAs, too. A resumed run computes the start again and goes on with the trained half.
    """

    class ConvertingTrainer(trainer):
        def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
            state_dict = self.model.state_dict() if state_dict is None else state_dict
            with _as_saved(self.model):
                super()._save(output_dir, joined(state_dict, self.run_record.start))

        def _check_adapter(self, checkpoint) -> None:
            with _as_saved(self.model):
                super()._check_adapter(checkpoint)

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
            with _trained_half(resume_from_checkpoint, self.run_record.start) as folder:
                super()._load_from_checkpoint(folder, model)

        def _load_best_model(self) -> None:
            best = self.state.best_model_checkpoint
            try:
                with _trained_half(best, self.run_record.start) as self.state.best_model_checkpoint:
                    super()._load_best_model()
            finally:
                self.state.best_model_checkpoint = best

    ConvertingTrainer.__name__ = trainer.__name__
    return ConvertingTrainer


@contextmanager
def _as_saved(model: PeftModel) -> Iterator[None]:
    """Within it the adapter's configuration is that of the LoRA that is saved."""
    config = model.peft_config["default"]
    model.peft_config["default"] = doubled(config)
    try:
        yield
    finally:
        model.peft_config["default"] = config


@contextmanager
def _trained_half(checkpoint: str | os.PathLike, start: dict[str, Tensor]) -> Iterator[str]:
    """A folder with the trained factors of a checkpoint.

    Raises:
        ValueError: the checkpoint began from another start than this run.
    """
    trained, initial = parted(read_weights(checkpoint), start)
    for name in initial:
        if ".lora_A." not in name:
            continue
        # Two computations of an SVD may differ in signs, which cancel in the product that was taken from the weights.
        B = name.replace(".lora_A.", ".lora_B.")
        there, here = initial[B].float() @ initial[name].float(), start[B].cpu().float() @ start[name].cpu().float()
        if (there - here).norm() > 1e-3 * here.norm():
            raise ValueError(
                f"{checkpoint} began from another start than this run, as the initial factors of {name} tell. Resume "
                "it with the same base model, data, seed and init_samples, or begin in another output_dir."
            )
    with TemporaryDirectory() as folder:
        save_file(trained, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        yield folder
