"""Direct preference optimization with LoRA, RefLoRA or LoRA-SB, from a clone; see hf_reflora/recipes/dpo.py.

accelerate launch recipes/dpo_reflora.py --config recipes/smollm2-135m/dpo_reflora.yaml
"""

from hf_reflora.recipes.dpo import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
