"""Re-estimation of BatchNorm running variances."""
