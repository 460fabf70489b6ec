"""Weights of fresh models corrected for dropout and for the nonlinearity (the paper's sections 2 and 4)."""
