"""BN layers under observation while somebody else's model runs on batches.

`layer` is one BN layer: what it normalises with, and what its input shows. `interception` catches
the calls of batch_norm in a forward, and `running` runs batches. `finite` and `outliers` look at
the samples, and `training_history` at what the layers say about their training.
"""
