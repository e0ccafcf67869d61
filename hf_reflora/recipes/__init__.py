"""The recipes: trainings that run from the command line or a YAML file (`sft`, `dpo`, `classify`)."""
