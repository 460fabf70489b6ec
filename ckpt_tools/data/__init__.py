"""Training data: a spec becomes batches of tensors."""
