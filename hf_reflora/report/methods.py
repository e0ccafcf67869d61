"""The methods as records name them and cards describe them, and their papers as TRL's trainers and cards cite them."""

from dataclasses import dataclass, field

from peft import PeftType


REFLORA_PAPER = {
    "title": "RefLoRA: Refactored Low-Rank Adaptation for Efficient Fine-Tuning of Large Models",
    "id": "2505.18877",
    # docstyle-ignore
    "citation": """\
@inproceedings{zhang2025reflora,
    title        = {{RefLoRA: Refactored Low-Rank Adaptation for Efficient Fine-Tuning of Large Models}},
    author       = {Yilang Zhang and Bingcong Li and Georgios B. Giannakis},
    year         = 2025,
    booktitle    = {Advances in Neural Information Processing Systems},
    eprint       = {2505.18877},
}""",
}

LORA_SB_PAPER = {
    "title": "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank "
    "Fine-Tuning",
    "id": "2411.19557",
    # docstyle-ignore
    "citation": """\
@article{ponkshe2024initialization,
    title        = {{Initialization using Update Approximation is a Silver Bullet for Extremely Efficient
                    Low-Rank Fine-Tuning}},
    author       = {Kaustubh Ponkshe and Raghav Singhal and Eduard Gorbunov and Alexey Tumanov and Samuel Horvath and
                    Praneeth Vepakomma},
    year         = 2024,
    eprint       = {2411.19557},
}""",
}


@dataclass(frozen=True)
class Method:
    """What a card says of a method."""

    name: str
    tags: list[str]  # of the card
    sentence: str  # what kind of adapter it is
    text: str  # what the method does
    papers: list[dict[str, str]] = field(default_factory=list)
    native: bool = False  # its adapters are of LoraSbConfig's type, which PEFT loads only with hf_reflora, or exported


METHODS = {
    "lora": Method(
        name="LoRA",
        tags=["lora"],
        sentence="This is a LoRA adapter.",
        text="LoRA trains B and A in W = W0 + s B A.",
    ),
    "reflora": Method(
        name="RefLoRA",
        tags=["lora", "reflora"],
        papers=[REFLORA_PAPER],
        sentence="This is a LoRA adapter trained with RefLoRA.",
        text="At every step RefLoRA takes the factorization of the update B A whose next step lowers the loss bound "
        "most. With P = A Aᵀ and Q = BᵀB it is given by the matrix geometric mean S = P⁻¹ # Q, and the gradients "
        "become ∇A ← S⁻¹ ∇A, ∇B ← ∇B S before the optimizer's step. The result is an ordinary LoRA.",
    ),
    "reflora_s": Method(
        name="RefLoRA-S",
        tags=["lora", "reflora"],
        papers=[REFLORA_PAPER],
        sentence="This is a LoRA adapter trained with RefLoRA-S.",
        text="RefLoRA-S keeps the factors of the update B A of one size: S = s I with s = ‖B‖/‖A‖, RefLoRA's scalar "
        "case. The result is an ordinary LoRA.",
    ),
    "lora_sb": Method(
        name="LoRA-SB",
        tags=["lora-sb"],
        papers=[LORA_SB_PAPER],
        sentence="This is a LoRA-SB adapter.",
        text="LoRA-SB trains R, r × r, in W = W0 + s B R A. B, R and A start as the best approximation of rank r of "
        "the first step of full fine-tuning, ΔW = −η sign(Σ∇), and B and A stay as they are.",
        native=True,
    ),
    "lora_xs": Method(
        name="LoRA-XS",
        tags=["lora-sb", "lora-xs"],
        sentence="This is a LoRA-XS adapter.",
        text="LoRA-XS trains R, r × r, in W = W0 + s B R A, with B and A from the leading singular vectors of W0.",
        native=True,
    ),
}

CONVERTED = (
    " That start was subtracted from the base model's weights. Saved are the trained factors joined with the negative "
    "initial ones, which is an ordinary LoRA of twice the rank for the base model itself."
)
# What a card says of an adapter's start (`RunRecord.init`): a sentence, and the papers.
STARTS: dict[str, tuple[str, list[dict[str, str]]]] = {
    "lora_sb": (
        "It started from LoRA-SB's subspace: B = U√S and A = √S Vᵀ of the best rank-r approximation of the first step "
        "of full fine-tuning.",
        [LORA_SB_PAPER],
    ),
    "gaussian": ("It started from normally distributed A and B = 0.", []),
    "orthogonal": ("It started from random A and B whose rows are orthogonal to each other, so that B A = 0.", []),
    "pissa": (
        "It started from PiSSA, the leading singular vectors of the base model's weights." + CONVERTED,
        [
            {
                "title": "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
                "id": "2404.02948",
            }
        ],
    ),
    "olora": (
        "It started from OLoRA, the QR decomposition of the base model's weights." + CONVERTED,
        [{"title": "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", "id": "2406.01775"}],
    ),
    "eva": (
        "It started from EVA: A has the leading singular vectors of each layer's inputs on training data, B is 0, and "
        "layers in which they explain more variance have higher ranks.",
        [
            {
                "title": "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
                "id": "2410.07170",
            }
        ],
    ),
    "corda": (
        "It started from CorDA's instruction-previewed mode: the leading singular vectors of the base model's weights "
        "times the covariance of their inputs on training data." + CONVERTED,
        [
            {
                "title": "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware "
                "Parameter-Efficient Fine-tuning",
                "id": "2406.05223",
            }
        ],
    ),
    "lora_ga": (
        "It started from LoRA-GA, the singular vectors of the gradient on training data." + CONVERTED,
        [{"title": "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", "id": "2407.05000"}],
    ),
}
# The same of the recipes' `optimizer`.
OPTIMIZERS: dict[str, tuple[str, list[dict[str, str]]]] = {
    "loraplus": (
        "The optimizer was LoRA+, in which B has a larger learning rate than A.",
        [{"title": "LoRA+: Efficient Low Rank Adaptation of Large Models", "id": "2402.12354"}],
    ),
    "riemannian": (
        "The optimizer had the gradients (BᵀB + δI)⁻¹ ∇A and ∇B (AAᵀ + δI)⁻¹ (Riemannian preconditioning).",
        [{"title": "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", "id": "2402.02347"}],
    ),
    "lora_fa": (
        "The optimizer was LoRA-FA, in which A stays as it is and B is trained.",
        [
            {
                "title": "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
                "id": "2308.03303",
            }
        ],
    ),
}


# How people write PEFT's other types, where that is not the type's own name.
PEFT_NAMES = {
    "ADALORA": "AdaLoRA",
    "ADAPTION_PROMPT": "LLaMA-Adapter",
    "FOURIERFT": "FourierFT",
    "IA3": "IA³",
    "LN_TUNING": "LN tuning",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "MISS": "MiSS",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "POLY": "Poly",
    "P_TUNING": "P-tuning",
    "PREFIX_TUNING": "prefix tuning",
    "PROMPT_TUNING": "prompt tuning",
    "RANDLORA": "RandLora",
    "ROAD": "RoAd",
    "SHIRA": "SHiRA",
    "TRAINABLE_TOKENS": "trainable tokens",
    "VBLORA": "VB-LoRA",
    "VERA": "VeRA",
    "XLORA": "X-LoRA",
}
DORA = Method(
    name="DoRA",
    tags=["lora"],
    sentence="This is a DoRA adapter.",
    text="DoRA trains B, A and m in W = m (W0 + s B A) / ‖W0 + s B A‖, with one norm and one m for each output.",
)


def method_named(name: str) -> Method:
    """The method of a record: one of ours, or the type of an adapter of PEFT in small letters, such as "vera".

    Raises:
        ValueError: there is none of this name.
    """
    if name in METHODS:
        return METHODS[name]
    if name.upper() not in PeftType.__members__:
        raise ValueError(
            f"There is no method {name!r}; a record's method is one of {', '.join(METHODS)}, or a type of PEFT in "
            "small letters."
        )
    shown = PEFT_NAMES.get(name.upper(), name.upper())
    sentence = f"This is a PEFT adapter of the type {shown}."
    return Method(name=shown, tags=[], sentence=sentence, text="")
