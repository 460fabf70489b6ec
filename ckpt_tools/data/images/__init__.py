"""Training data in image files: reading, decoding, resizing and normalising them."""
