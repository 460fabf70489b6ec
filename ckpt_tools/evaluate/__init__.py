"""Metrics of a classifier with standard errors, a temperature for it, and a gate."""
