"""Somebody else's model, handled with care: whatever a forward changes in it is put back.

`preserving` has the context managers that the other rooms use. `model_state` remembers a model,
with `object_state` for Python objects and `tensor_state` for tensors. `torch_settings` and
`randomness` do the same for the process, and `restoring` carries out what puts things back.
`batch` and `calling` know how a model is called, `model_copy` and `rebinding` make copies for
forwards that must not touch the model, and `overwriting` writes new values into it.
"""
