"""Configuration of LoRA-SB as a PEFT method."""

import math
from dataclasses import dataclass, field
from enum import Enum

from peft.config import PeftConfig

from ..requirements import require


class LoraSbPeftType(str, Enum):
    """LoRA-SB's `peft_type` in `adapter_config.json`.

    A member of PEFT's own `PeftType` cannot be added from outside. A string Enum hashes and compares like its string,
    so that PEFT's tables find this one as well.
    """

    LORASB = "LORASB"


INIT_WEIGHTS = ("lora_sb", "lora_xs", True, False)


@dataclass
class LoraSbConfig(PeftConfig):
    """Configuration of a [`LoraSbModel`]: W = W0 + s B R A, where B and A are fixed and only R (r, r) is trained.

    LoRA-SB (https://huggingface.co/papers/2411.19557) takes B and A from the first step of full fine-tuning, LoRA-XS
    (https://huggingface.co/papers/2405.17604) takes them from the SVD of W0. The layers may be `nn.Linear`, the 4- and
    8-bit linear layers of bitsandbytes, and transformers' `Conv1D`; for others use a `LoraConfig`.

    Args:
        r (`int`, defaults to 64): Rank; r² numbers are trained per layer. A smaller layer gets rank min(in, out).
        target_modules (`list[str]` or `str`, *optional*): Names, a regular expression, or `"all-linear"`. Default: the
            modules that PEFT's LoRA adapts in this architecture.
        exclude_modules (`list[str]` or `str`, *optional*): Names or a regular expression of modules to leave out.
        scaling (`float`, defaults to 1): s. The paper shows that it does not matter (Theorem 5) and uses 1.
        lorasb_dropout (`float`, defaults to 0): Probability with which the adapter's inputs are dropped.
        init_weights (`"lora_sb"`, `"lora_xs"` or `bool`, defaults to `"lora_sb"`):
            - `"lora_sb"`: the layer computes W0 until [`initialize_lora_sb_weights`] or [`LoraSbCallback`] sets B, R
              and A. Training before that raises a RuntimeError.
            - `"lora_xs"`: B = U diag(S), A = Vᵀ of W0's leading singular triplets, R = 0. This SVD is computed again
              whenever an adapter is loaded, unless with `low_cpu_mem_usage=True`.
            - `True`: random orthonormal B and A, and R = 0, so that the model starts at W0. `False`: R is random, too
              (for tests).
        rank_pattern (`dict[str, int]`): Ranks of layers that differ from r, by name or regular expression.
        modules_to_save (`list[str]`, *optional*): Further modules to train and save in full, such as a new classifier.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*): Ids of tokens whose embeddings are
            trained and saved, perhaps by the name of the embedding layer. TRL sets it for the tokens that
            `chat_template_path` adds.
        layers_to_transform (`int` or `list[int]`, *optional*): Indices of the only layers to adapt.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the `nn.ModuleList` that `layers_to_transform`
            counts.

    Raises:
        ImportError: With PEFT before 0.21, which saves and loads adapters of its own types only.
        ValueError: for a value out of range, or options that exclude each other.

    Example:
        >>> from peft import get_peft_model
        >>> from hf_reflora import LoraSbConfig, initialize_lora_sb_weights
        >>> model = get_peft_model(base_model, LoraSbConfig(r=64, target_modules="all-linear"))
        >>> initialize_lora_sb_weights(model, dataloader, eta=1e-6)
    """

    r: int = field(default=64, metadata={"help": "Rank; r*r numbers are trained per layer"})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names, a regular expression or 'all-linear'. Default: as PEFT's LoRA for the architecture"},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules to leave out"}
    )
    scaling: float = field(default=1.0, metadata={"help": "s in W = W0 + s B R A"})
    lorasb_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter's input"})
    init_weights: bool | str = field(
        default="lora_sb",
        metadata={"help": "'lora_sb' (from gradients, see LoraSbCallback), 'lora_xs' (from W0), True (W0) or False"},
    )
    rank_pattern: dict = field(
        default_factory=dict, metadata={"help": "Ranks that differ from r, by module name or regular expression"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save in full"}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Ids of tokens to train the embeddings of, or ids by embedding layer"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the only layers to adapt"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the nn.ModuleList that layers_to_transform counts"}
    )

    def __post_init__(self):
        # Here, and not where the module is imported: that happens whenever PEFT is, and an older one is no harm until
        # somebody asks for such an adapter. Before 0.21 PEFT saves and loads the types in its own PeftType only.
        require(
            "peft",
            "0.21",
            "LoRA-SB adapters are saved and loaded by",
            "With an older one give a LoraConfig to LoraSbCallback: it initializes an ordinary LoRA in that subspace.",
        )
        super().__post_init__()
        self.peft_type = LoraSbPeftType.LORASB
        # PEFT compares with sets; a JSON file and a command line have lists.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            # True is an int in Python
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"The rank must be a positive integer, got {r!r} for {name}.")
        if not (math.isfinite(self.scaling) and self.scaling > 0):
            raise ValueError(f"scaling must be a positive number, got {self.scaling}.")
        if not 0 <= self.lorasb_dropout < 1:
            raise ValueError(f"lorasb_dropout must be in [0, 1), got {self.lorasb_dropout}.")
        # `in` would take 1 for True and 0.0 for False.
        if not any(self.init_weights is v if isinstance(v, bool) else self.init_weights == v for v in INIT_WEIGHTS):
            raise ValueError(f"init_weights must be one of {INIT_WEIGHTS}, got {self.init_weights!r}.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform needs target_modules as a list of names, got {self.target_modules!r}: a regular "
                "expression can name the layers itself."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: give both or none.")
