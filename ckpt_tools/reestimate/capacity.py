"""How many samples fit into memory at once."""

from __future__ import annotations

import torch

from ckpt_tools.machine.memory import available_bytes

LARGEST = 512  # the bias of `pooled` falls like 1/batch; beyond this, sampling error dominates
_SHARE = 0.25  # of the free memory; convolution workspaces and allocator slack come on top of activations


def fitting_batch_size(bytes_per_sample: int, device: str, sharing: int = 1) -> int:
    """The largest power of two up to 512 as batch whose live activations take a quarter of the free memory.

    A power of two, so that a little more or less free memory on ``device`` does not change the result.
    ``sharing``: processes with such a batch each on that device; together they take half of it at most.
    """
    if bytes_per_sample <= 0:
        return LARGEST
    share = min(_SHARE, 0.5 / sharing)
    fitting = min(LARGEST, int(share * free_bytes(device)) // bytes_per_sample)
    return 1 << max(2, fitting).bit_length() - 1


def free_bytes(device: str) -> int:
    """Memory that a new allocation on ``device`` can count on; for the CPU also within the container's limit."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()
