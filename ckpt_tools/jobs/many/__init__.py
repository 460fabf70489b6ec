"""Many checkpoints: in one process, or as tasks of a Ray cluster."""
