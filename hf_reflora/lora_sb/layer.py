"""LoRA-SB's layer: a linear layer that adds s B R A to its weight."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..distributed.backend import optimizer_steps_in_float32
from ..distributed.parameters import write_parameter_
from .config import LoraSbConfig
from .subspace import truncated_svd


HALF = (torch.float16, torch.bfloat16)


class _ParameterDict(nn.ParameterDict):
    """Keeps R in float32 when the model is cast to 16 bits, in which AdamW's updates of R would be rounded away."""

    def _apply(self, fn, recurse=True):
        # Module.to(), .half() and .bfloat16() all go through _apply, with a function that moves and casts.
        def keep_dtype(tensor):
            cast = fn(tensor)
            return tensor.to(cast.device) if cast.dtype in HALF and tensor.dtype not in HALF else cast

        return super()._apply(keep_dtype, recurse)


class LoraSbLayer(BaseTunerLayer):
    """W = W0 + s B R A around a layer whose weight is W0.

    For each adapter, in float32 unless it was made with `autocast_adapter_dtype=False`:

    - `lorasb_R`: R (r, r), the only parameter.
    - `lorasb_A` (r, in) and `lorasb_B` (out, r): buffers. As parameters they would be frozen only until something,
      such as PEFT's `set_adapter`, makes every parameter of an adapter trainable.
    - `r`, `scaling` and `lorasb_dropout`; and `initialized`, the names of the adapters whose B and A are set.
    """

    adapter_layer_names = ("lorasb_R",)
    other_param_names = ("lorasb_A", "lorasb_B")

    def __init__(self, base_layer: nn.Module):
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.initialized: set[str] = set()
        self.lorasb_dropout = nn.ModuleDict()
        self.lorasb_R = _ParameterDict()
        # Persistent, thus saved: nothing could compute B and A again without the training data.
        self.lorasb_A = BufferDict(persistent=True)
        self.lorasb_B = BufferDict(persistent=True)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, r: int, config: LoraSbConfig) -> None:
        """Adds an adapter, initialized as `config.init_weights` says; r is clamped to min(in, out)."""
        r = min(r, self.in_features, self.out_features)
        self.r[adapter_name] = r
        self.scaling[adapter_name] = config.scaling
        dropout = nn.Dropout(config.lorasb_dropout) if config.lorasb_dropout else nn.Identity()
        self.lorasb_dropout.update({adapter_name: dropout})
        # Not in torch.get_default_dtype(), which may be bfloat16: torch has no QR decomposition in it, for one thing.
        self.lorasb_R[adapter_name] = nn.Parameter(torch.zeros(r, r, dtype=torch.float32))
        self.lorasb_A[adapter_name] = torch.zeros(r, self.in_features, dtype=torch.float32)
        self.lorasb_B[adapter_name] = torch.zeros(self.out_features, r, dtype=torch.float32)
        # On the meta device (low_cpu_mem_usage=True) there is nothing to compute: the checkpoint brings R, A and B.
        if self.lorasb_R[adapter_name].device.type != "meta":
            if self.merged:
                self.unmerge()  # LoRA-XS decomposes W0, not W0 with another adapter
            self._initialize(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # PEFT's way to make R trainable, or to freeze it where it is loaded for inference.
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def _initialize(self, adapter_name: str, init_weights: bool | str) -> None:
        r = self.r[adapter_name]
        if init_weights == "lora_sb":  # waits for gradients; until then B = R = A = 0
            return
        if init_weights == "lora_xs":
            U, S, V = truncated_svd(self.dequantized_weight(), r)
            self.set_factors(adapter_name, U * S, torch.zeros(r, r), V.T)
            return
        B = torch.linalg.qr(torch.randn(self.out_features, r, dtype=torch.float32)).Q
        A = torch.linalg.qr(torch.randn(self.in_features, r, dtype=torch.float32)).Q.T
        R = torch.zeros(r, r) if init_weights else torch.randn(r, r, dtype=torch.float32) / r**0.5
        self.set_factors(adapter_name, B, R, A)

    @torch.no_grad()
    def set_factors(self, adapter_name: str, B: Tensor, R: Tensor, A: Tensor) -> None:
        """Copies B (out, r), R (r, r) and A (r, in) into the adapter and marks it as initialized.

        In place, because an optimizer or a backend may hold these tensors already. Collective where R is sharded.
        """
        self.lorasb_B[adapter_name].copy_(B)
        # FSDP2 and DeepSpeed shard parameters, and DeepSpeed steps on copies of them; buffers are plain tensors.
        write_parameter_(self.lorasb_R[adapter_name], R)
        self.lorasb_A[adapter_name].copy_(A)
        self.initialized.add(adapter_name)

    @torch.no_grad()
    def copy_adapter(self, source: str, target: str) -> None:
        """Copies B, R and A of one adapter into another one of the same rank."""
        for tensors in (self.lorasb_B, self.lorasb_R, self.lorasb_A):
            tensors[target].copy_(tensors[source])
        if source in self.initialized:
            self.initialized.add(target)

    def dequantized_weight(self) -> Tensor:
        """W0 as (out, in) and in a floating-point dtype, also where it is quantized or, as in Conv1D, (in, out)."""
        weight = self._readable_weight()
        return weight.T if self.fan_in_fan_out else weight

    def _readable_weight(self) -> Tensor:
        """W0 in a floating-point dtype of 16 bits or more and in the base layer's orientation.

        Raises:
            TypeError: The weight is quantized in a way that PEFT cannot undo.
        """
        weight = dequantize_module_weight(self.get_base_layer()).detach()
        if not weight.is_floating_point() or weight.element_size() < 2:  # such as float8, whose scales are elsewhere
            raise TypeError(
                f"LoRA-SB needs the base weight itself for this, but it is stored as {weight.dtype}, from which PEFT "
                "cannot compute it. Load the base model in bfloat16 or float32, or quantized by bitsandbytes."
            )
        return weight

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """s B R A in R's dtype and in the base weight's orientation: (out, in), or (in, out) in Conv1D."""
        R = self.scaling[adapter_name] * self.lorasb_R[adapter_name]
        A, B = self.lorasb_A[adapter_name].to(R.dtype), self.lorasb_B[adapter_name].to(R.dtype)
        delta = B @ (R @ A)
        return delta.T if self.fan_in_fan_out else delta

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for by_name in (self.r, self.scaling, self.lorasb_dropout):
            if adapter_name in by_name:
                del by_name[adapter_name]
        self.initialized.discard(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True  # for PEFT's convert_to_lora and save_as_lora; export_lora is exact and needs no SVD

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # To its device only. PEFT would cast to its dtype, too, and in bfloat16 B and A would not be orthonormal.
        if adapter_name not in self.lorasb_R:
            return
        device = device or self.get_base_layer().weight.device
        # A tensor on the meta device has no data to move.
        if device.type == "meta" or self.lorasb_R[adapter_name].device.type == "meta":
            return
        for tensors in (self.lorasb_R, self.lorasb_A, self.lorasb_B):
            tensors[adapter_name] = tensors[adapter_name].to(device)


class Linear(nn.Module, LoraSbLayer):
    """LoRA-SB on `nn.Linear`, bitsandbytes' `Linear4bit` and `Linear8bitLt`, and transformers' `Conv1D`."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, config: LoraSbConfig):
        nn.Module.__init__(self)  # which does not call that of LoraSbLayer
        LoraSbLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.disable_adapters and self.merged:  # as PEFT's layers do: disable_adapter() means the base model
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.lorasb_R:
                self._check_trainable(name)
                result = result + self._delta(x, name).to(result.dtype)
        return result

    def _delta(self, x: Tensor, name: str) -> Tensor:
        """What the adapter adds to the output: s x Aᵀ Rᵀ Bᵀ, (..., out)."""
        A, R, B = self.lorasb_A[name], self.lorasb_R[name], self.lorasb_B[name]
        # Autocast casts the inputs of F.linear; without it x may be 16-bit while A is float32.
        x = self.lorasb_dropout[name](self._cast_input_dtype(x, A.dtype))
        # From the right, so that every product has r columns and none is (out, in). Where FSDP2 or DeepSpeed train in
        # mixed precision, R is a 16-bit copy here, and A is not.
        return F.linear(F.linear(F.linear(x, A), self.scaling[name] * R.to(A.dtype)), B)

    def _check_trainable(self, name: str) -> None:
        """Raises a RuntimeError where training would silently change nothing."""
        R = self.lorasb_R[name]
        if not (self.training and R.requires_grad and torch.is_grad_enabled()):
            return
        if name not in self.initialized:  # with B = A = 0, R's gradient is 0
            raise RuntimeError(
                f'The LoRA-SB adapter "{name}" has init_weights="lora_sb" and is not initialized yet: training would '
                "change nothing. Call initialize_lora_sb_weights(model, dataloader, ...), or give the trainer a "
                'LoraSbCallback; or choose init_weights="lora_xs" or True, which need no data.'
            )
        if R.dtype in HALF and not optimizer_steps_in_float32():
            raise RuntimeError(
                f'R of the LoRA-SB adapter "{name}" is {R.dtype}, in which an optimizer\'s updates are rounded away. '
                "Leave autocast_adapter_dtype=True. Where TRL casts R (quantized models), add a LoraSbCallback, which "
                "makes it float32 again."
            )

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        result = result.clone()  # the base layer's output may be needed by autograd or a hook as it is
        for name in set(adapter_names) & set(self.lorasb_R):  # "__base__" stands for no adapter
            rows = [i for i, row_name in enumerate(adapter_names) if row_name == name]
            result[rows] += self._delta(x[rows], name).to(result.dtype)
        return result

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds s B R A to the base weight. A quantized weight is dequantized, changed and quantized again, with loss.

        Args:
            safe_merge: Check that the new weight is finite before it replaces the old one.
            adapter_names: Adapters to merge. Default: the active ones.

        Raises:
            ValueError: with `safe_merge`, if the new weight is not finite.
            TypeError: The base weight is quantized, but not by bitsandbytes.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lorasb_R:
                merged = self._base_weight_plus(self.get_delta_weight(name))
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                self._set_base_weight(merged)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtracts the merged adapters from the base weight again, which restores it up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lorasb_R:
                self._set_base_weight(self._base_weight_plus(-self.get_delta_weight(name)))

    def _base_weight_plus(self, delta: Tensor) -> Tensor:
        weight = self._readable_weight()
        return (weight + delta.to(weight.device)).to(weight.dtype)

    def _set_base_weight(self, weight: Tensor) -> None:
        base = self.get_base_layer()
        kind = type(base.weight).__name__  # by name, so that bitsandbytes need not be installed
        if type(base.weight).__module__.startswith("torchao."):
            # Assigning `data` would change nothing, and only the user knows how the weight was quantized.
            raise TypeError(
                f"LoRA-SB cannot merge into a weight that torchao has quantized ({kind}). Load the base model without "
                "quantization to merge, or keep the adapter apart."
            )
        if kind not in ("Params4bit", "Int8Params"):
            base.weight.data = weight  # stays the same Parameter, which may be tied to another layer's
            return
        import bitsandbytes as bnb

        old = base.weight
        if kind == "Int8Params":
            # Quantized on the way to the device, hence first to the CPU. The layer's state caches the old weight.
            new = bnb.nn.Int8Params(weight.to("cpu"), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
            base.state.reset_grads()
        else:
            # The constructor takes what the instance holds, but neither the data nor its private attributes.
            settings = {k: v for k, v in vars(old).items() if k != "data" and not k.startswith("_")}
            new = bnb.nn.Params4bit(weight.to("cpu"), **settings | {"requires_grad": False, "bnb_quantized": False})
        base.weight = new.to(old.device)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # `initialized` is not saved. An adapter that was saved before its initialization has A = 0.
        for name in self.lorasb_R:
            A = state_dict.get(f"{prefix}lorasb_A.{name}")
            if A is not None:
                (self.initialized.add if A.any() else self.initialized.discard)(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return "lora_sb." + super().__repr__()
