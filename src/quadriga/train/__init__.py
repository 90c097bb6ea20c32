"""Training: the one loop, its data order, its step and its checkpoints."""
