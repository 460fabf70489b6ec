"""One module for each file format: bytes become tensors and plain values, nothing is executed."""
