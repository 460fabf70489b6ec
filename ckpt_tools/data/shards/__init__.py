"""Data in WebDataset shards, on disk or behind URLs."""
