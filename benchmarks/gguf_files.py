"""A base model and a LoRA adapter in llama.cpp's file format, GGUF, of the architecture "llama"."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.numpy import load_file


NAMES = {
    **{f"self_attn.{x}_proj": f"attn_{x if x != 'o' else 'output'}" for x in "qkvo"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def write_float32(source: Path, target: Path) -> None:
    """A copy of a quantized GGUF model in float32, with weights rounded to bfloat16 as the embedded model has them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            subtype = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=subtype)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        weights = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        writer.add_tensor(tensor.name, weights.to(torch.bfloat16).float().numpy())
    _finish(writer)


def write_adapter(folder: Path, target: Path, heads: int, kv_heads: int) -> None:
    """A LoRA as llama.cpp's convert_lora_to_gguf.py writes it: all settings of PEFT that it reads are alpha's."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        layer, module = name.removeprefix("base_model.model.model.layers.").split(".", 1)
        module, kind = module.removesuffix(".weight").rsplit(".", 1)
        if kind == "lora_B" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = _rotary(tensor, heads if module == "self_attn.q_proj" else kv_heads)
        writer.add_tensor(f"blk.{layer}.{NAMES[module]}.weight.{kind.lower()}", np.ascontiguousarray(tensor))
    _finish(writer)


def _rotary(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates pairs of neighbouring rows, transformers the two halves of a head."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
