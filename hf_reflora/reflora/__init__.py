"""RefLoRA (https://huggingface.co/papers/2505.18877): mathematics, one step for each backend, callback, optimizer."""
