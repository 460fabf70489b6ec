"""The demonstration: a small DenseNet with dropout, trained on bundled digits, then corrected."""
