"""What each process has measured, packed into one tensor to exchange, and merged again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ckpt_tools.distributed import Team
from ckpt_tools.model.overwriting import overwrite_tensor
from ckpt_tools.moments import Clusters, Evidence, Moments, merge_all
from ckpt_tools.observation.layer import Layer

# Rows of C values a layer: mean and M2, then the means (3) and co-moments (3 × 3) of the clusters
# of images and of whole batches.
_ROWS = 2 + 2 * (3 + 9)


def combine_shares(layers: Sequence[Layer], before: Sequence[Evidence | None], team: Team) -> None:
    """Merge into each layer what all processes have measured since ``before``.

    Args:
        layers: their ``evidence`` is what this process has measured; afterwards all processes hold
            the same, bit by bit, because all merge in the order of ranks.
        before: the evidence that all processes had in common.
        team: exchanges one tensor, whatever the number of layers.
    """
    channels = [len(layer.stored.mean) for layer in layers]
    device = layers[0].stored.mean.device
    local_share = pack_evidence([layer.evidence for layer in layers], channels).to(device)
    shares = [unpack_evidence(share.to(device), channels) for share in team.gather(local_share)]
    for layer, *parts in zip(layers, before, *shares, strict=True):
        layer.evidence = merge_all(parts)


def share_buffers(model: nn.Module, team: Team) -> None:
    """Copy the floating-point buffers of rank 0 to every process.

    Under DistributedDataParallel each process trains running statistics of its own.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point() and buffer.numel()]
    if team.alone or not buffers:
        return
    # One tensor for all, because each exchange waits for the slowest process.
    flat = torch.cat([buffer.detach().double().flatten() for buffer in buffers])
    pieces = team.gather(flat)[0].split([buffer.numel() for buffer in buffers])
    for buffer, piece in zip(buffers, pieces, strict=True):
        overwrite_tensor(buffer, piece.view(buffer.shape))


def pack_evidence(parts: Sequence[Evidence | None], channels: Sequence[int]) -> Tensor:
    """One float64 tensor: three counts for each layer, then the rows of each layer.

    A layer without evidence is all zeros.
    """
    counts = [_counts(part) for part in parts]
    statistics = [_flatten(part, width) for part, width in zip(parts, channels, strict=True)]
    pairs = zip(parts, statistics, strict=True)
    device = next((piece.device for part, piece in pairs if part), None)
    # float64 holds counts exactly up to 2⁵³.
    flat = torch.tensor(counts, dtype=torch.float64).flatten()
    return torch.cat([piece.to(device) for piece in (flat, *statistics)])


def unpack_evidence(flat: Tensor, channels: Sequence[int]) -> list[Evidence | None]:
    """The inverse of ``pack_evidence``; ``channels`` is the width of each layer."""
    head = 3 * len(channels)
    counts = flat[:head].long().view(-1, 3).tolist()
    pieces = flat[head:].split([_ROWS * width for width in channels])
    return [
        _evidence(layer_counts, piece.view(_ROWS, -1))
        for layer_counts, piece in zip(counts, pieces, strict=True)
    ]


def _counts(part: Evidence | None) -> tuple[int, int, int]:
    return (part.moments.count, part.clusters.count, part.batches.count) if part else (0, 0, 0)


def _flatten(part: Evidence | None, width: int) -> Tensor:
    if part is None:
        return torch.zeros(_ROWS * width, dtype=torch.float64)
    tensors = [part.moments.mean, part.moments.m2]
    for clusters in (part.clusters, part.batches):
        tensors += [clusters.mean, clusters.comoments]
    return torch.cat([tensor.flatten() for tensor in tensors])


def _evidence(counts: Sequence[int], rows: Tensor) -> Evidence | None:
    values, *cluster_counts = counts
    if not values:
        return None
    clusters = [
        Clusters(count, part[:3], part[3:].view(3, 3, -1))
        for count, part in zip(cluster_counts, rows[2:].split(12), strict=True)
    ]
    return Evidence(Moments(values, rows[0], rows[1]), *clusters)
