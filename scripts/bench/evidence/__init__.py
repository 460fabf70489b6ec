"""Compare the estimators on small trained nets, with inputs of many kinds and with none."""
