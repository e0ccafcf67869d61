"""Supervised fine-tuning with LoRA, RefLoRA or LoRA-SB, from a clone; see hf_reflora/recipes/sft.py.

accelerate launch recipes/sft_reflora.py --config recipes/smollm2-135m/reflora.yaml
"""

from hf_reflora.recipes.sft import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
