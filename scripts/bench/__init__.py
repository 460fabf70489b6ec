"""Measure speed, memory and how often the checks are right, each beside its peers in one run."""
