"""What a run was and what came of it: the run record, the model card and the plot."""
