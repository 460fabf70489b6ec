"""What each process has measured, packed into one tensor to exchange, and merged again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ckpt_tools.distributed import Team
from ckpt_tools.model.overwriting import overwrite_tensor
from ckpt_tools.moments import Clusters, Moments
from ckpt_tools.observation.evidence import Evidence, merge_all
from ckpt_tools.observation.layer import Layer


def combine_shares(layers: Sequence[Layer], before: Sequence[Evidence | None], team: Team) -> None:
    """Merge into each layer what all processes have measured since ``before``.

    Args:
        layers: their ``evidence`` is what this process has measured; afterwards all processes hold
            the same, bit by bit, because all merge in the order of ranks.
        before: the evidence that all processes had in common.
        team: exchanges one tensor, whatever the number of layers.
    """
    channels = [len(layer.stored.mean) for layer in layers]
    device, paired = layers[0].stored.mean.device, layers[0].paired
    local_share = pack_evidence([layer.evidence for layer in layers], channels, paired=paired).to(device)
    shares = [
        unpack_evidence(share.to(device), channels, paired=paired) for share in team.gather(local_share)
    ]
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


def pack_evidence(
    parts: Sequence[Evidence | None], channels: Sequence[int], *, paired: bool = False
) -> Tensor:
    """One float64 tensor: four counts for each layer, then the rows of each layer.

    A layer without evidence is all zeros. ``paired``: whether the evidence is that of paired
    measurements.
    """
    counts = [_counts(part) for part in parts]
    statistics = [_flatten(part, width, paired) for part, width in zip(parts, channels, strict=True)]
    pairs = zip(parts, statistics, strict=True)
    device = next((piece.device for part, piece in pairs if part), None)
    # float64 holds counts exactly up to 2⁵³.
    flat = torch.tensor(counts, dtype=torch.float64).flatten()
    return torch.cat([piece.to(device) for piece in (flat, *statistics)])


def unpack_evidence(flat: Tensor, channels: Sequence[int], *, paired: bool = False) -> list[Evidence | None]:
    """The inverse of ``pack_evidence``; ``channels`` is the width of each layer."""
    head = 4 * len(channels)
    counts = flat[:head].long().view(-1, 4).tolist()
    pieces = flat[head:].split([_count_rows(paired) * width for width in channels])
    return [
        _evidence(layer_counts, piece.view(_count_rows(paired), -1), paired)
        for layer_counts, piece in zip(counts, pieces, strict=True)
    ]


def _count_rows(paired: bool) -> int:
    """Rows of C values a layer.

    Mean and M2 under each condition, then the means and co-moments of the sums of the clusters of
    images, and of whole batches.
    """
    conditions = 2 if paired else 1
    sums = 3 * conditions
    return 2 * conditions + 2 * (sums + sums**2)


def _counts(part: Evidence | None) -> tuple[int, int, int, int]:
    if part is None:
        return 0, 0, 0, 0
    training = part.training.count if part.training else 0
    return part.moments.count, training, part.clusters.count, part.batches.count


def _flatten(part: Evidence | None, width: int, paired: bool) -> Tensor:
    if part is None:
        return torch.zeros(_count_rows(paired) * width, dtype=torch.float64)
    tensors = [part.moments.mean, part.moments.m2]
    if part.training is not None:
        tensors += [part.training.mean, part.training.m2]
    for clusters in (part.clusters, part.batches):
        tensors += [clusters.mean, clusters.comoments]
    return torch.cat([tensor.flatten() for tensor in tensors])


def _evidence(counts: Sequence[int], rows: Tensor, paired: bool) -> Evidence | None:
    values, training_values, *cluster_counts = counts
    if not values:
        return None
    conditions = 2 if paired else 1
    sums = 3 * conditions
    clusters, batches = (
        Clusters(count, part[:sums], part[sums:].view(sums, sums, -1))
        for count, part in zip(cluster_counts, rows[2 * conditions :].chunk(2), strict=True)
    )
    training = Moments(training_values, rows[2], rows[3]) if paired else None
    return Evidence(Moments(values, rows[0], rows[1]), clusters, batches, training)
