"""From a checkpoint file to the model it belongs to."""
