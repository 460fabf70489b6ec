"""Data in image files: reading, decoding, resizing, normalising."""
