"""Writing a file that appears whole and verified, or not at all."""
