"""Training data: a spec becomes batches of tensors."""

from ckpt_tools.data.source import Source, open_source
from ckpt_tools.data.stream import Batch, BatchStream, Skipped

__all__ = ["Batch", "BatchStream", "Skipped", "Source", "open_source"]
