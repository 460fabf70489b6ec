"""Which files make up a checkpoint, where they are, and what stands beside them."""
