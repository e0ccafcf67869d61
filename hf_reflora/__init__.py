"""Better low-rank adapters in the Hugging Face stack: RefLoRA and LoRA-SB for PEFT, Trainer, TRL and plain PyTorch.

The public names are listed in `__init__.pyi` and loaded when they are first used, so that `import hf_reflora` is
instant and nobody pays for a library that they do not use.
"""

import lazy_loader
import wrapt


__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


@wrapt.when_imported("peft")
def _register_lora_sb(peft) -> None:
    """Tells PEFT about LoRA-SB as soon as PEFT is there.

    `PeftModel.from_pretrained` looks the adapter's type up in PEFT's own tables and raises a KeyError if it is
    missing. A user who writes nothing but `import hf_reflora` must find it there, although that import does not load
    PEFT.
    """
    from . import lora_sb  # noqa: F401
