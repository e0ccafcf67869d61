"""LoRA-SB as a PEFT tuner: which modules get a layer, in which dtype, and how a mixed batch reaches the layers."""

from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .config import LoraSbConfig
from .layer import Linear, LoraSbLayer


class LoraSbModel(BaseTuner):
    """A model with LoRA-SB adapters (https://huggingface.co/papers/2411.19557), made by `peft.get_peft_model`.

    The base model's weights are not modified, so that `disable_adapter()` gives outputs that are bit-identical to the
    base model's. Only `merge_adapter` changes them, and `unmerge_adapter` restores them up to rounding.

    PEFT knows the `peft_type` "LORASB" once hf_reflora is imported: `import hf_reflora` before
    `PeftModel.from_pretrained`, which raises a KeyError otherwise. For users without hf_reflora, `export_lora` writes
    an ordinary LoRA adapter.

    `add_adapter("ref", model.peft_config["default"])` makes a copy of the adapter "default", which TRL's trainers take
    as their reference; any other adapter is initialized as its configuration says.

    Args:
        model (`torch.nn.Module`): The model to adapt.
        config ([`LoraSbConfig`]): The adapter's configuration.
        adapter_name (`str`): The adapter's name.
        low_cpu_mem_usage (`bool`, defaults to `False`): Make the adapter on the meta device, without memory, for a
            checkpoint that is loaded next.

    Raises:
        TypeError: for target modules that are not linear layers; exclude them or use a `LoraConfig`.
    """

    prefix = "lorasb_"
    tuner_layer_cls = LoraSbLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: LoraSbConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs,
    ) -> None:
        r = peft_config.rank_pattern.get(get_pattern_key(peft_config.rank_pattern.keys(), current_key), peft_config.r)
        if isinstance(target, LoraSbLayer):
            target.update_layer(adapter_name, r, peft_config)
            # TRL's DPO, KTO, GRPO and RLOO trainers take a given adapter as their reference: they add an adapter
            # "ref" with the very configuration of "default" and copy the parameters whose names have ".default." in
            # them. No name of a LoRA-SB layer has (R's ends with it, A and B are buffers), so that the reference
            # would silently be the base model. Therefore such an adapter starts as a copy.
            if adapter_name == "ref" and peft_config is self.peft_config.get("default"):
                target.copy_adapter("default", "ref")
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        # NonDynamicallyQuantizableLinear is the out_proj of nn.MultiheadAttention, which reads its weight and never
        # calls it: an adapter there would have no effect.
        if not isinstance(base, nn.Linear | Conv1D) or isinstance(base, NonDynamicallyQuantizableLinear):
            raise TypeError(
                f"LoRA-SB cannot adapt {current_key}, a {type(base).__name__}: it knows torch.nn.Linear (and "
                "the 4- and 8-bit ones of bitsandbytes) and transformers.pytorch_utils.Conv1D. Choose other "
                "target_modules, put it into exclude_modules, or use LoraConfig."
            )
        self._replace_module(parent, target_name, Linear(target, adapter_name, r, peft_config), target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # With autocast_adapter_dtype=False PEFT promises adapters in the base layer's dtype. Its own layers make them
        # in it, to be cast up otherwise; LoRA-SB's layers make them in float32, to be cast down here.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self.model.modules():
            if isinstance(layer, LoraSbLayer) and adapter_name in layer.lorasb_R:
                base = layer.get_base_layer()
                dtype = getattr(base, "compute_dtype", base.weight.dtype)  # of bitsandbytes' 4-bit layers
                if dtype is not None and dtype.is_floating_point:
                    R = layer.lorasb_R[adapter_name]
                    layer.lorasb_R[adapter_name] = nn.Parameter(R.to(dtype), requires_grad=R.requires_grad)
                    for tensors in (layer.lorasb_A, layer.lorasb_B):
                        tensors[adapter_name] = tensors[adapter_name].to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """Passes `adapter_names`, the adapter of each row of a mixed batch, to the layers.

        PeftModel takes the argument out of the call. A tuner without this method would drop it silently and let one
        adapter answer all rows.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [m for m in self.modules() if isinstance(m, LoraSbLayer)]
        unknown = set(adapter_names) - {"__base__"}.union(*(layer.lorasb_R.keys() for layer in layers))
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        beams = kwargs.get("num_beams") or 1

        def add_names(module, args, kwargs):
            x = args[0] if args else next(iter(kwargs.values()))  # some models call layers with input=x
            # Beam search repeats each row for its beams, except in an encoder, which sees it once.
            repeats = beams if len(x) == beams * len(adapter_names) else 1
            return args, kwargs | {"adapter_names": [name for name in adapter_names for _ in range(repeats)]}

        # Modules of `modules_to_save` choose their copy by adapter_names, too.
        targets = [*layers, *(m for m in self.modules() if isinstance(m, AuxiliaryTrainingWrapper))]
        handles = [module.register_forward_pre_hook(add_names, with_kwargs=True) for module in targets]
        try:
            yield
        finally:  # also after an error, or the next call would still use these names
            for handle in handles:
                handle.remove()


def restore_float32(model: nn.Module) -> None:
    """Makes every R float32 again where something has cast it, in place. Call it before the optimizer's first step.

    In 16 bits an optimizer's small updates of R would be rounded away.
    """
    for layer in model.modules():
        if isinstance(layer, LoraSbLayer):
            for R in layer.lorasb_R.values():
                # Through `data`, so that it stays the same Parameter: an optimizer may hold it already.
                R.data = R.data.to(torch.promote_types(R.dtype, torch.float32))
