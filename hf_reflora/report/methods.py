"""The papers, as TRL's trainers and the card name them."""

REFLORA = {
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

LORA_SB = {
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
