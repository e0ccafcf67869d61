"""Sequence classification with LoRA, RefLoRA or LoRA-SB, from a clone; see hf_reflora/recipes/classify.py.

accelerate launch recipes/classify_reflora.py --config recipes/glue/mrpc_reflora.yaml
"""

from hf_reflora.recipes.classify import main, make_parser


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
