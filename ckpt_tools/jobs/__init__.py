"""The jobs from file to file: re-estimating running variances, initialising weights."""
