"""Do the stored statistics describe the data?

`agreement` measures how far the inputs of BN layers are from their stored statistics. `hypotheses`
are other ways of preprocessing the data, and `augmentations` are what training may have done to it.
`data_sample` scores the data as they would change it, and `data_check` reaches a verdict.
"""
