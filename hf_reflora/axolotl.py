"""RefLoRA in axolotl (https://docs.axolotl.ai): a plugin that the YAML file of a run names.

The lines to add, of which the block `reflora` may be left out:

    plugins:
      - hf_reflora.axolotl.RefLoraPlugin
    reflora:
      method: reflora
      warmup_steps: 100
"""

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict
from pydantic.dataclasses import dataclass

from .reflora.callback import RefLoraCallback
from .reflora.settings import RefLora


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Settings(RefLora):
    """RefLoRA's settings as pydantic checks them. axolotl ignores unknown keys; a misspelled one is an error here."""


class RefLoraArgs(BaseModel):
    """The keys that `RefLoraPlugin` adds to axolotl's YAML files.

    Args:
        reflora: The settings of `hf_reflora.RefLora` by name. Default: RefLoRA's own defaults.
    """

    reflora: Settings | None = None


class RefLoraPlugin(BasePlugin):
    """Adds `RefLoraCallback` to axolotl's trainer (RefLoRA, https://huggingface.co/papers/2505.18877).

    All of axolotl's trainers derive from transformers' Trainer and none of them replaces its training loop, so the
    callback works in each: SFT and pretraining, DPO, IPO, ORPO, KTO, SimPO, GRPO, EBFT, reward and process reward
    models. SFT and DPO were run with axolotl 0.19 on a CPU; for the others, and for axolotl's fused LoRA kernels,
    which need a GPU, the code was only read. It needs `adapter: lora` or `qlora`, also with `peft_use_dora`,
    `peft_use_rslora` or `loraplus_lr_ratio`. `optimizer` may be any with which `RefLoraCallback` works. Do not choose
    `muon`, `dion`, `polora` or one of GaLore's: they transform the gradients in their own way, which undoes RefLoRA's.

    axolotl logs a plugin that it cannot import, for example because hf_reflora is not installed, and trains without
    it. Look for "Plugin loaded successfully" in its log.

    Raises:
        ValueError: when the configuration is read, for a setting of `reflora` that is unknown or out of range; when
            the trainer is made, where `RefLoraCallback` could not work: no trainable LoRA pair, FSDP1
            (`fsdp_version: 1`), or an optimizer that steps inside the backward pass.
    """

    def get_input_args(self) -> str:
        return "hf_reflora.axolotl.RefLoraArgs"

    def add_callbacks_post_trainer(self, cfg, trainer) -> list[RefLoraCallback]:
        callback = RefLoraCallback(**(cfg.reflora or {}))
        callback.check(trainer.args, trainer.model, trainer.optimizer)
        return [callback]
