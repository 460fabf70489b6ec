"""Training data: a spec becomes batches of tensors."""

from ckpt_tools.data.data_source import Source, open_source
from ckpt_tools.data.stream import Batch, BatchStream, SkippedSample

__all__ = ["Batch", "BatchStream", "SkippedSample", "Source", "open_source"]
