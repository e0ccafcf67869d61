"""The methods' settings as dataclasses for `TrlParser` and `HfArgumentParser`."""

from dataclasses import dataclass, field

from ..lora_sb.callback import LoraSbCallback
from ..reflora.callback import RefLoraCallback


@dataclass
class RefLoraArguments:
    """Settings of RefLoRA (https://huggingface.co/papers/2505.18877) on the command line and in YAML files.

    Every field is `reflora_` and the name of an argument of `RefLoraCallback`.

    Raises:
        ValueError: at construction, for a value out of range.
    """

    reflora_form: str | None = field(
        default=None,
        metadata={
            "help": "How S acts: 'precondition' the gradients (Theorems 3 and 5), or 'rescale' the factors and the "
            "optimizer's moments (RefLoRA-S only, the authors' code). Default: precondition for reflora, rescale for "
            "reflora_s."
        },
    )
    reflora_eps: float | None = field(
        default=None,
        metadata={
            "help": "Shrinkage ε in (0, 1] of P = AAᵀ and Q = BᵀB towards multiples of I; 1 is RefLoRA-S. Default: "
            "the smallest safe one, max(1e-5, 4r·2⁻²⁴) in float32, 1e-12 in float64."
        },
    )
    reflora_dtype: str = field(
        default="float32", metadata={"help": "Least dtype of P, Q and S: float32 or float64 (Theorem 6 to rounding)."}
    )
    reflora_warmup_steps: int = field(
        default=0,
        metadata={"help": "First optimizer steps without refactoring. The paper uses 100 (GLUE, LLaMA2/3) or 200."},
    )
    reflora_interval: int = field(
        default=1, metadata={"help": "Refactor at every interval-th optimizer step (the paper: 1)."}
    )
    reflora_smoothness: float | None = field(
        default=None,
        metadata={
            "help": "L, smoothness constant of the loss in W: below the learning rate η = 1/(2L‖BA‖_*) S is scaled as "
            "Theorems 3 and 5 say. Default: not used."
        },
    )

    def __post_init__(self):
        self.callback("reflora_s" if self.reflora_form == "rescale" else "reflora")  # raises on wrong values

    def callback(self, method: str) -> RefLoraCallback:
        """The callback with these settings for `method`, "reflora" or "reflora_s"."""
        return RefLoraCallback(
            method,
            form=self.reflora_form,
            eps=self.reflora_eps,
            dtype=self.reflora_dtype,
            warmup_steps=self.reflora_warmup_steps,
            interval=self.reflora_interval,
            smoothness=self.reflora_smoothness,
        )


@dataclass
class LoraSbArguments:
    """Settings of LoRA-SB's initialization (https://huggingface.co/papers/2411.19557) on the command line and in YAML.

    Every field is `lorasb_` and the name of an argument of `LoraSbCallback`.

    Raises:
        ValueError: at construction, for a value out of range.
    """

    lorasb_num_samples: int | None = field(
        default=None,
        metadata={"help": "Training samples for the initialization. Default: 0.1 % of the data, at least 25."},
    )
    lorasb_eta: float | None = field(
        default=None,
        metadata={"help": "η of the update. Default: the first learning rate above 0 (lr/warm-up)."},
    )
    lorasb_passes: int | None = field(
        default=None,
        metadata={
            "help": "Passes over these samples, each for a part of the layers: 1 is fastest and takes 4 bytes for "
            "each adapted weight. Default: as many as keep the memory within that of a training step with LoRA."
        },
    )
    lorasb_start_at_base: bool = field(
        default=False, metadata={"help": "Start at the base model instead of its first update, in the same subspace."}
    )

    def __post_init__(self):
        self.callback()  # raises on wrong values

    def callback(self) -> LoraSbCallback:
        """The callback with these settings."""
        return LoraSbCallback(
            num_samples=self.lorasb_num_samples,
            eta=self.lorasb_eta,
            passes=self.lorasb_passes,
            start_at_base=self.lorasb_start_at_base,
        )
