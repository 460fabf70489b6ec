"""Which samples of a batch stand out: of one colour, or far above what the others show.

A sample is judged by the logarithm of its energy. The energy of an input is the mean square of its
values. In a BN layer it is the squared distance from the running mean in units of the running
variance, as a geometric mean over channels. There a sample that is 100 times too large lies at 9.2,
whatever the data, and a channel that fires for one sample in a thousand changes little.
``scripts/bench outliers`` measures how far clean data stays away from the limits.
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
from ckpt_tools.model.batch import Batch, batch_size, select_samples
from ckpt_tools.model.layouts import is_plain
from ckpt_tools.observation.finite import not_finite_rows

MIN_COMPARED = 8  # with fewer samples nothing can be called unusual
SELF_SUFFICIENT = 4 * MIN_COMPARED  # a batch of so many samples is compared with itself alone
INPUT_LIMIT = math.log(25)  # least distance of an outlier from the median: five times too large
LAYER_LIMIT = math.log(100)  # the same in a BN layer, where clean samples differ more

# An outlier lies above the median by so many distances from the median to the upper quartile (0.67
# standard deviations of a normal distribution).
_QUARTILE_DISTANCES = 8
# Below an outlier, this share of its distance from the median must be empty: a tail that thins out
# shows a few samples on the way.
_GAP = 0.5
_FEW_SAMPLES = 4  # divided by the number compared, this share is added to the limits
_HISTORY = 256  # values that small batches are compared with
_HEAD_VALUES = 32  # values that distinguish a sample from most others
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Suspect:
    """Why a sample stands out.

    ``leverage`` is its energy in units of the median sample's at the place ``where`` that is
    largest: "input" or the name of a BN layer. None if it could not be measured.
    """

    reason: OutlierReason
    leverage: float | None
    where: str


def is_extreme(values: Tensor, reference: Tensor, least: float = INPUT_LIMIT) -> Tensor:
    """A mask (n,) of the ``values`` (n,) that are no part of what ``reference`` (m,) shows.

    Both are logarithms of energies; ``least`` is the least distance of an outlier from the median.
    With fewer than 8 values for reference nothing is extreme.
    """
    return margins(values, reference, least) > 1


def margins(values: Tensor, reference: Tensor, least: float = INPUT_LIMIT) -> Tensor:
    """How far each value (n,) is on the way to being an outlier: above 1 it is one."""
    if len(reference) < MIN_COMPARED:
        return torch.zeros_like(values)
    # Median and upper quartile stay where they are until a quarter of the samples are outliers.
    probabilities = torch.tensor([0.5, 0.75], dtype=reference.dtype)
    median, upper = torch.quantile(reference, probabilities).tolist()
    limit = max(least, _QUARTILE_DISTANCES * (upper - median))
    limit *= 1 + _FEW_SAMPLES / len(reference)
    distance = values - median
    usual = _highest_usual(reference - median, limit)
    gap = (distance - usual) / (_GAP * distance.clamp_min(least))
    within = distance / limit
    return torch.where(distance > limit, torch.minimum(within, gap), within)


def _highest_usual(distances: Tensor, limit: float) -> float:
    """The largest distance that is reached from below the limit without crossing a gap."""
    usual = float(distances[distances <= limit].max())
    for distance in distances[distances > limit].sort().values.tolist():
        if distance - usual > _GAP * distance:
            break
        usual = distance
    return usual


class EnergyHistory:
    """The latest logarithms of energies at one place (the input or a BN layer)."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=_HISTORY)

    def reference_for(self, values: Tensor) -> Tensor:
        """What to compare ``values`` with: themselves, and earlier ones while they are few."""
        if len(values) >= SELF_SUFFICIENT:
            return values
        return torch.cat([torch.tensor(list(self._values), dtype=values.dtype), values])

    def remember(self, values: Tensor) -> None:
        """Add values that are usual.

        Only the latest 256 are kept, so that a comparison costs the same in a long pass.
        """
        self._values.extend(values[-_HISTORY:].tolist())


def has_extreme_cluster(energy: Tensor, images: int, history: EnergyHistory) -> bool:
    """Whether some cluster (k,) of the ``images`` looks as if one of its images were extreme.

    The question is how large a single image would have to be to explain its cluster by itself.
    """
    reference = history.reference_for(energy)
    if len(energy) < min(4, images):
        return False  # rows of this layer belong to no single image, so none could be found
    # exp(50) is beyond every limit and still finite, hence the clamps below.
    size, median = images / len(energy), reference.median()
    # This bound rules out nearly every batch; the comparison below costs more.
    if size * math.expm1(min(float(energy.max() - median), 50)) <= math.exp(LAYER_LIMIT) - 1:
        return False

    def as_single_images(clusters: Tensor) -> Tensor:
        return torch.log1p(size * torch.expm1((clusters - median).clamp(0, 50)))

    single, reference = as_single_images(energy), as_single_images(reference)
    return bool(is_extreme(single, reference, LAYER_LIMIT).any())


def extreme_samples(
    energies: Mapping[str, Tensor], histories: Mapping[str, EnergyHistory]
) -> dict[int, Suspect]:
    """Samples that are extreme in some layer, by their place in its ``energies`` (n,)."""
    suspects: dict[int, Suspect] = {}
    for name, values in energies.items():
        extreme = is_extreme(values, histories[name].reference_for(values), LAYER_LIMIT)
        for place in extreme.nonzero().flatten().tolist():
            suspects.setdefault(place, Suspect("extreme", None, name))
    return {place: with_leverage(place, item, energies) for place, item in suspects.items()}


def overflowing_samples(energies: Mapping[str, Tensor]) -> dict[int, Suspect]:
    """Samples that are not finite in the first layer that has any.

    Behind that layer their neighbours are not finite either: the batch variance is not.
    """
    for name, values in energies.items():
        places = (~values.isfinite()).nonzero().flatten().tolist()
        if places:
            return dict.fromkeys(places, Suspect("not finite", None, name))
    return {}


def with_leverage(place: int, suspect: Suspect, energies: Mapping[str, Tensor]) -> Suspect:
    """The same suspect, described by the layer in which its leverage is largest."""
    for name, values in energies.items():
        distance = float(values[place] - values.median())
        if math.isfinite(distance) and math.exp(distance) > (suspect.leverage or 0):
            suspect = replace(suspect, leverage=math.exp(distance), where=name)
    return suspect


def log_energies(batch: Batch) -> Tensor | None:
    """The logarithm of each sample's mean square (n,), on the CPU.

    None if the input is no single tensor of floating-point samples.
    """
    x = _single_input(batch)
    if x is None:
        return None
    dtype = torch.promote_types(x.dtype, torch.float32)
    dims = list(range(1, x.ndim))
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, dtype=dtype).double().cpu()
    # The square of a finite value may overflow; those rows are computed again in float64.
    for row in norm.isinf().nonzero().flatten().tolist():
        norm[row] = torch.linalg.vector_norm(x[row].double().cpu())
    # The clamp makes the logarithm of a sample of zeros finite.
    return (2 * norm.log() - math.log(x[0].numel())).clamp_min(-60)


def one_colour_rows(batch: Batch) -> list[int]:
    """Rows of images (n, C, …) whose channels hold one value each.

    Of vectors (n, F), these are the rows that hold a single value other than 0:
    a vector of zeros may be a sample without entries.
    """
    x = _single_input(batch)
    if x is None or x[0].numel() < MIN_COMPARED:
        return []
    channels = x.flatten(2) if x.ndim > 2 else x.unsqueeze(1)
    if channels.shape[2] < MIN_COMPARED:
        return []
    # Some eight values a channel exclude nearly every row; only the others are compared in full.
    probes = channels[:, :, :: max(1, channels.shape[2] // 8)]
    rows = (probes == probes[:, :, :1]).flatten(1).all(1).nonzero().flatten()
    if len(rows):
        same = (channels[rows] == channels[rows][:, :, :1]).flatten(1).all(1)
        rows = rows[same & ((channels[rows, 0, 0] != 0) | (x.ndim > 2))]
    return list(rows.tolist())


def fingerprints(batch: Batch, heads: Collection[bytes] | None = None) -> list[bytes] | None:
    """What a later pass recognises each sample by; None if the input is no single tensor.

    A fingerprint is a ``head`` of some values and a digest of all. The digest, which takes longer,
    is left out for samples whose head is not among ``heads``.
    """
    x = _single_input(batch)
    if x is None:
        return None
    rows = x.reshape(len(x), -1)
    columns = torch.linspace(0, rows.shape[1] - 1, min(_HEAD_VALUES, rows.shape[1])).long()
    values = [row.numpy().tobytes() for row in rows[:, columns.tolist()].float().cpu()]
    return [
        head + (_digest(row) if heads is None or head in heads else b"")
        for head, row in zip(values, rows, strict=True)
    ]


def fingerprint_head(fingerprint: bytes) -> bytes:
    """The part of a sample's fingerprint that is computed fast."""
    return fingerprint[:-_DIGEST_BYTES]


def _digest(row: Tensor) -> bytes:
    content = row.double().cpu().numpy().tobytes()
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


class InputFilter:
    """Removes from batches the samples that their input alone shows to be outliers."""

    def __init__(self) -> None:
        self._history = EnergyHistory()

    def remove_outliers(self, batch: Batch, number: int) -> Batch:
        """The batch without its outliers; unchanged if no finite sample would be left.

        Raises DataError, naming the batch by ``number``, like ``not_finite_rows``.
        """
        not_finite = set(not_finite_rows(batch, number))
        finite = [row for row in range(batch_size(batch)) if row not in not_finite]
        if not finite:
            return batch
        if not_finite:
            batch = select_samples(batch, finite)
        outliers = set(find_suspects(batch, self._history))
        usual = [row for row in range(len(finite)) if row not in outliers]
        # Where a sixteenth of the samples looks unusual, that is what the data look like.
        too_many = not usual or len(outliers) > max(3, len(finite) // 16)
        return select_samples(batch, usual) if outliers and not too_many else batch


def find_suspects(
    batch: Batch, history: EnergyHistory, ignored: Collection[OutlierReason] = ()
) -> dict[int, Suspect]:
    """Rows of a finite batch that its input alone shows to be outliers.

    The energies of the other rows are added to ``history``. Reasons in ``ignored`` do not count.
    """
    energies = log_energies(batch) if len(ignored) < 2 else None
    if energies is None:
        return {}
    reference = history.reference_for(energies)
    reasons: dict[int, OutlierReason] = {}
    if "extreme" not in ignored:
        extreme = is_extreme(energies, reference).nonzero().flatten().tolist()
        reasons.update(dict.fromkeys(extreme, "extreme"))
    if "blank" not in ignored:
        reasons.update(dict.fromkeys(one_colour_rows(batch), "blank"))
    history.remember(energies[[row for row in range(len(energies)) if row not in reasons]])
    median = float(reference.median())
    return {
        row: Suspect(reason, math.exp(float(energies[row]) - median), "input")
        for row, reason in reasons.items()
    }


def _single_input(batch: Batch) -> Tensor | None:
    """The input (n, …) if it is a single floating-point tensor with strides, else None."""
    if isinstance(batch, Mapping):
        return None
    x = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
    if isinstance(x, Tensor) and is_plain(x) and x.is_floating_point() and x.ndim > 1 and x.numel():
        return x
    return None
