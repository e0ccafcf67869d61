"""Which learning rate, which method? Runs a recipe for every combination of some options, from a clone.

python recipes/sweep.py sft --config recipes/smollm2-135m/lora.yaml --eval_strategy epoch \\
    --grid method=lora,reflora learning_rate=1e-3,2e-3,4e-3 seed=0,1,2

See hf_reflora/sweep/command.py.
"""

from hf_reflora.sweep.command import main


if __name__ == "__main__":
    main()
