"""How good a classifier is: error, NLL and calibration with standard errors, a temperature, and a gate."""
