"""Tensors and plain data out of any pickle; nothing in it is imported, looked up or called."""

from ckpt_tools.storage.formats.pickles.opaque_object import OpaqueObject
from ckpt_tools.storage.formats.pickles.pickle_file import load_archive, load_pickle, load_stream
from ckpt_tools.storage.formats.pickles.tensors import NOT_DENSE

__all__ = ["NOT_DENSE", "OpaqueObject", "load_archive", "load_pickle", "load_stream"]
