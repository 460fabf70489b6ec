"""Reading, writing and comparing checkpoint files."""
