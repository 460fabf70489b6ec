"""What the ranks of a job have seen of the same layers: one tensor a rank, and back together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ckpt_tools.distributed import Team
from ckpt_tools.model.overwriting import overwrite_tensor
from ckpt_tools.moments import Clusters, Evidence, Moments, merge_all
from ckpt_tools.reestimate.layer import Layer


def combine(layers: Sequence[Layer], before: Sequence[Evidence | None], team: Team) -> None:
    """Add to what all knew ``before`` what each rank has seen of its layers since, in the order of ranks.

    Afterwards all ranks hold the same. It takes one exchange, whatever the number of layers.
    """
    channels = [len(layer.stored.mean) for layer in layers]
    device = layers[0].stored.mean.device
    mine = packed([layer.seen for layer in layers], channels).to(device)
    shares = [unpacked(part.to(device), channels) for part in team.gather(mine)]
    for layer, *parts in zip(layers, before, *shares, strict=True):
        layer.seen = merge_all(parts)


def share_buffers(model: nn.Module, team: Team) -> None:
    """Give every rank rank 0's floating-point buffers: under DDP each trains running statistics of its own."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point() and buffer.numel()]
    if team.alone or not buffers:
        return
    flat = torch.cat([buffer.detach().double().flatten() for buffer in buffers])
    pieces = team.gather(flat)[0].split([buffer.numel() for buffer in buffers])
    for buffer, piece in zip(buffers, pieces, strict=True):
        overwrite_tensor(buffer, piece.view(buffer.shape))


def packed(parts: Sequence[Evidence | None], channels: Sequence[int]) -> Tensor:
    """One float64 tensor: three counts a layer, then all its statistics; zeros where nothing was seen."""
    counts = [_counts(part) for part in parts]
    statistics = [_flat(part, width) for part, width in zip(parts, channels, strict=True)]
    device = next((piece.device for part, piece in zip(parts, statistics, strict=True) if part), None)
    flat = torch.tensor(counts, dtype=torch.float64).flatten()
    return torch.cat([piece.to(device) for piece in (flat, *statistics)])


def unpacked(flat: Tensor, channels: Sequence[int]) -> list[Evidence | None]:
    """What ``packed`` was given."""
    head = 3 * len(channels)
    counts = flat[:head].long().view(-1, 3).tolist()
    pieces = flat[head:].split([_ROWS * width for width in channels])
    return [_evidence(three, piece.view(_ROWS, -1)) for three, piece in zip(counts, pieces, strict=True)]


_ROWS = 2 + 2 * (3 + 9)  # of a layer's channels: mean and M2; means and co-moments of two kinds of clusters


def _counts(part: Evidence | None) -> tuple[int, int, int]:
    return (part.moments.count, part.clusters.count, part.batches.count) if part else (0, 0, 0)


def _flat(part: Evidence | None, width: int) -> Tensor:
    if part is None:
        return torch.zeros(_ROWS * width, dtype=torch.float64)
    two = [part.moments.mean, part.moments.m2]
    rest = [tensor for kind in (part.clusters, part.batches) for tensor in (kind.mean, kind.comoments)]
    return torch.cat([tensor.flatten() for tensor in two + rest])


def _evidence(counts: Sequence[int], rows: Tensor) -> Evidence | None:
    values, *clusters = counts
    if not values:
        return None
    kinds = [
        Clusters(count, part[:3], part[3:].view(3, 3, -1))
        for count, part in zip(clusters, rows[2:].split(12), strict=True)
    ]
    return Evidence(Moments(values, rows[0], rows[1]), *kinds)
