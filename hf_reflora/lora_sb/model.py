"""LoRA-SB as a PEFT tuner."""

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

    The base model's weights are never modified, so `disable_adapter()` gives its outputs to the bit, except after
    `merge_adapter`, which changes them and takes its change back up to rounding. `import hf_reflora` before
    `PeftModel.from_pretrained`: PEFT then knows the `peft_type` "LORASB" and otherwise raises a KeyError.

    Args:
        model (`torch.nn.Module`): The model to adapt.
        config ([`LoraSbConfig`]): Its configuration.
        adapter_name (`str`): The adapter's name.
        low_cpu_mem_usage (`bool`, defaults to `False`): Put R on the meta device, for loading a checkpoint.

    Raises:
        TypeError: for target modules that are not linear layers.
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
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        # nn.MultiheadAttention reads its out_proj's weight and never calls it.
        if not isinstance(base, nn.Linear | Conv1D) or isinstance(base, NonDynamicallyQuantizableLinear):
            raise TypeError(
                f"LoRA-SB cannot adapt {current_key}, a {type(base).__name__}: it knows torch.nn.Linear (and "
                "the 4- and 8-bit ones of bitsandbytes) and transformers.pytorch_utils.Conv1D. Choose other "
                "target_modules, put it into exclude_modules, or use LoraConfig."
            )
        self._replace_module(parent, target_name, Linear(target, adapter_name, r, peft_config), target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Layers make their adapters in float32; without autocast PEFT promises the base layer's dtype.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self.model.modules():
            if isinstance(layer, LoraSbLayer) and adapter_name in layer.lorasb_R:
                dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1]
                if dtype is not None and dtype.is_floating_point:
                    R = layer.lorasb_R[adapter_name]
                    layer.lorasb_R[adapter_name] = nn.Parameter(R.to(dtype), requires_grad=R.requires_grad)
                    for tensors in (layer.lorasb_A, layer.lorasb_B):
                        tensors[adapter_name] = tensors[adapter_name].to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """Hands `adapter_names` of a mixed batch to the layers."""
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
            x = args[0] if args else next(iter(kwargs.values()))
            # Beam search repeats each row; an encoder still sees it once.
            repeats = beams if len(x) == beams * len(adapter_names) else 1
            return args, kwargs | {"adapter_names": [name for name in adapter_names for _ in range(repeats)]}

        targets = [*layers, *(m for m in self.modules() if isinstance(m, AuxiliaryTrainingWrapper))]
        handles = [module.register_forward_pre_hook(add_names, with_kwargs=True) for module in targets]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def restore_float32(model: nn.Module) -> None:
    """Makes every R float32 again where something cast it, in place: before an optimizer has seen it."""
    for layer in model.modules():
        if isinstance(layer, LoraSbLayer):
            for R in layer.lorasb_R.values():
                R.data = R.data.to(torch.promote_types(R.dtype, torch.float32))
