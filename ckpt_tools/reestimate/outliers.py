"""Which samples of a batch stand out: not finite, of one colour, or far above what the others show.

How much a sample weighs is judged by the logarithm of its energy: the mean square of an input's values, or, in a BN
layer, the squared distance from the running mean in units of the running variance, its geometric mean over channels.
There a sample 100 times too large lies at 9.2, whatever the data, and a channel that fires for one sample in a
thousand moves little. ``scripts/run bench outliers`` measures how far clean data stays away from the limits.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ckpt_tools.contract import OutlierReason
from ckpt_tools.errors import DataError
from ckpt_tools.model.batch import Batch, batch_size, input_tensors, iterate_inputs, select_samples

FEWEST = 8  # samples that can tell what is usual
ENOUGH = 4 * FEWEST  # that need no others to tell it
FLOOR = math.log(25)  # of how far from the median an input must lie: five times too large
DEEP_FLOOR = math.log(100)  # in a layer, where clean samples differ more
SPREADS = 8  # of the way from the median to the upper quartile, which is 0.67 standard deviations of a normal law
GAP = 0.5  # of a sample's way from the median that must be empty: tails that thin out show a few samples on it
_DOUBT = 4  # divided by how many are compared: limits are that much farther out
_REMEMBERED = 256  # values that small batches are compared with
_PRINT = 32  # values of a sample that tell it from most others
_DIGEST = 16  # bytes


@dataclass(frozen=True)
class Suspect:
    """Why a sample stands out, and how: its energy in units of the median one's, at the place where that is largest."""

    reason: OutlierReason
    leverage: float | None
    where: str


def apart(values: Tensor, among: Tensor, floor: float = FLOOR) -> Tensor:
    """Which of ``values`` (n,) lie above what ``among`` (m,), logarithms of energies, can show; none if m < 8."""
    return margins(values, among, floor) > 1


def margins(values: Tensor, among: Tensor, floor: float = FLOOR) -> Tensor:
    """How far up each value is on the way to what makes an outlier of it: 1 and less is usual."""
    if len(among) < FEWEST:
        return torch.zeros_like(values)
    middle, upper = torch.quantile(among, torch.tensor([0.5, 0.75], dtype=among.dtype)).tolist()
    limit = max(floor, SPREADS * (upper - middle)) * (1 + _DOUBT / len(among))
    distance = values - middle
    usual = _highest_usual(among - middle, limit)
    gap = (distance - usual) / (GAP * distance.clamp_min(floor))
    return torch.where(distance > limit, torch.minimum(distance / limit, gap), distance / limit)


def _highest_usual(distances: Tensor, limit: float) -> float:
    """The last one below the limit, or above it on a ladder whose steps are no gaps."""
    usual = float(distances[distances <= limit].max())
    for distance in distances[distances > limit].sort().values.tolist():
        if distance - usual > GAP * distance:
            break
        usual = distance
    return usual


class Gauge:
    """Logarithms of energies in the order in which they come: what is usual here."""

    def __init__(self) -> None:
        self._known: deque[float] = deque(maxlen=_REMEMBERED)

    def among(self, values: Tensor) -> Tensor:
        """What to compare these with: themselves, and while they are few, those before."""
        if len(values) >= ENOUGH:
            return values
        return torch.cat([torch.tensor(list(self._known), dtype=values.dtype), values])

    def remember(self, values: Tensor) -> None:
        """These were usual, or are so few among others that they do not matter."""
        self._known.extend(values[-_REMEMBERED:].tolist())


def clusters_odd(energy: Tensor, images: int, gauge: Gauge) -> bool:
    """Whether a layer's clusters (k,) of ``images`` samples look as if one of them were extreme.

    The question is what a single sample would have to be to explain its cluster by itself.
    """
    among = gauge.among(energy)
    if len(energy) < min(4, images):
        return False  # whoever stands out could not be found: rows of this layer belong to no single sample
    size, middle = images / len(energy), among.median()
    if size * math.expm1(min(float(energy.max() - middle), 50)) <= math.exp(DEEP_FLOOR) - 1:
        return False  # as nearly always
    single, others = (torch.log1p(size * torch.expm1((one - middle).clamp(0, 50))) for one in (energy, among))
    return bool(apart(single, others, DEEP_FLOOR).any())


def extremes(energy: Mapping[str, Tensor], gauges: Mapping[str, Gauge]) -> dict[int, Suspect]:
    """Samples that are extreme in some layer, by the energies (n,) that every layer has seen of them."""
    found: dict[int, Suspect] = {}
    for name, values in energy.items():
        for place in apart(values, gauges[name].among(values), DEEP_FLOOR).nonzero().flatten().tolist():
            found.setdefault(place, Suspect("extreme", None, name))
    return {place: weighed(place, one, energy) for place, one in found.items()}


def overflowing(energy: Mapping[str, Tensor]) -> dict[int, Suspect]:
    """Samples that are not finite in the first layer that saw any; behind it, their neighbours are not, either."""
    for name, values in energy.items():
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        if bad:
            return dict.fromkeys(bad, Suspect("not finite", None, name))
    return {}


def weighed(place: int, suspect: Suspect, energy: Mapping[str, Tensor]) -> Suspect:
    """The same with its leverage where that is largest."""
    for name, values in energy.items():
        higher = float(values[place] - values.median())
        if math.isfinite(higher) and math.exp(higher) > (suspect.leverage or 0):
            suspect = replace(suspect, leverage=math.exp(higher), where=name)
    return suspect


def not_finite(batch: Batch, number: int) -> list[int]:
    """Rows of a batch whose input holds NaN or infinity. Raises DataError if a batch that cannot be cut does.

    Among named arguments may be an attention mask, whose infinities are meant: there only NaN counts.
    """
    if all(math.isfinite(tensor.sum()) for tensor in input_tensors(batch)):  # as is no sum with NaN or infinity in it
        return []
    bad: set[int] = set()
    for row, tensor in iterate_inputs(batch):
        wrong = tensor.isnan() if isinstance(batch, Mapping) else ~tensor.isfinite()
        if row is not None:
            bad |= {row} if bool(wrong.any()) else set()
        elif tensor.ndim and len(tensor) == batch_size(batch):
            bad.update(wrong.reshape(len(tensor), -1).any(1).nonzero().flatten().tolist())
        elif bool(wrong.any()):
            raise DataError(
                f"batch {number}: NaN or infinity in the input, in a tensor {tuple(tensor.shape)} that belongs to no "
                "single sample. Remove it or fix the preprocessing."
            )
    return sorted(bad)


def energies(batch: Batch) -> Tensor | None:
    """The logarithm of the mean square of every sample (n,) on the CPU; None for what is no tensor of samples."""
    x = _one_tensor(batch)
    if x is None:
        return None
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=list(range(1, x.ndim)), dtype=wide).double().cpu()
    for row in norm.isinf().nonzero().flatten().tolist():  # the squares of finite values may not be
        norm[row] = torch.linalg.vector_norm(x[row].double().cpu())
    return (2 * norm.log() - math.log(x[0].numel())).clamp_min(-60)


def one_colour(batch: Batch) -> list[int]:
    """Rows of images, (n, C, …), whose channels hold one value each, and of vectors that hold one, which is not 0."""
    x = _one_tensor(batch)
    if x is None or x[0].numel() < FEWEST:
        return []
    parts = x.flatten(2) if x.ndim > 2 else x.unsqueeze(1)
    if parts.shape[2] < FEWEST:
        return []
    probes = parts[:, :, :: max(1, parts.shape[2] // 8)]
    rows = (probes == probes[:, :, :1]).flatten(1).all(1).nonzero().flatten()  # few, if any
    if len(rows):
        same = (parts[rows] == parts[rows][:, :, :1]).flatten(1).all(1)
        rows = rows[same & ((parts[rows, 0, 0] != 0) | (x.ndim > 2))]
    found: list[int] = rows.tolist()
    return found


def fingerprints(batch: Batch, heads: Collection[bytes] | None = None) -> list[bytes] | None:
    """What a later pass knows every sample by; None for what is no tensor of samples.

    Some values, its ``head``, and a digest of all: of each sample, or only of those whose head is among ``heads``.
    """
    x = _one_tensor(batch)
    if x is None:
        return None
    rows = x.reshape(len(x), -1)
    places = torch.linspace(0, rows.shape[1] - 1, min(_PRINT, rows.shape[1])).long().tolist()
    some = [row.numpy().tobytes() for row in rows[:, places].float().cpu()]
    return [
        values + (_digest(row) if heads is None or values in heads else b"")
        for values, row in zip(some, rows, strict=True)
    ]


def head(fingerprint: bytes) -> bytes:
    """Of a sample's fingerprint what is quickly made."""
    return fingerprint[:-_DIGEST]


def _digest(row: Tensor) -> bytes:
    return hashlib.blake2b(row.double().cpu().numpy().tobytes(), digest_size=_DIGEST).digest()


class Look:
    """Batches without the samples that their input alone shows to be outliers: for a first look at the data."""

    def __init__(self) -> None:
        self._gauge = Gauge()

    def usual(self, batch: Batch, number: int) -> Batch:
        """The batch, or what is left of it; as it is where nothing usual would be left."""
        bad = set(not_finite(batch, number))
        finite = [row for row in range(batch_size(batch)) if row not in bad]
        if not finite:
            return batch
        rest = select_samples(batch, finite) if bad else batch
        odd = set(unusual(rest, self._gauge))
        kept = [row for row in range(len(finite)) if row not in odd]
        if not kept or len(odd) > max(3, len(finite) // 16):  # so many are no outliers
            return rest
        return select_samples(rest, kept) if odd else rest


def unusual(batch: Batch, gauge: Gauge, ignored: Collection[OutlierReason] = ()) -> dict[int, Suspect]:
    """Rows of a finite batch that its input alone shows to be outliers; the others are remembered."""
    values = energies(batch) if len(ignored) < 2 else None
    if values is None:
        return {}
    among = gauge.among(values)
    high = apart(values, among).nonzero().flatten().tolist() if "extreme" not in ignored else []
    blank = one_colour(batch) if "blank" not in ignored else []
    reasons: dict[int, OutlierReason] = {**dict.fromkeys(high, "extreme"), **dict.fromkeys(blank, "blank")}
    gauge.remember(values[[row for row in range(len(values)) if row not in reasons]])
    middle = float(among.median())
    return {row: Suspect(why, math.exp(float(values[row]) - middle), "input") for row, why in reasons.items()}


def _one_tensor(batch: Batch) -> Tensor | None:
    """The input (n, …), where it is a single tensor of floats."""
    if isinstance(batch, Mapping):
        return None
    given = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
    if isinstance(given, Tensor) and given.is_floating_point() and given.ndim > 1 and given.numel():
        return given
    return None
