"""Which framework runs the training, and parameters that it keeps in parts."""
