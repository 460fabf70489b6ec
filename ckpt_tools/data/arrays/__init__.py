"""Data in array files: rows of numbers or of pixels."""
