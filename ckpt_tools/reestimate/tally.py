"""How much of the data was read, and which samples of it did not count."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ckpt_tools.contract import OutlierReason
from ckpt_tools.reestimate.screening import DetectedOutlier, tolerated_outliers
from ckpt_tools.results import Outlier

_COMMON_BATCHES = 0.25  # share of the batches with an outlier above which that is what data look like


@dataclass(frozen=True)
class Tally:
    """How much of the data one process, or all of them together, has read.

    ``images`` and ``checksum`` are of the samples that counted, ``outliers`` are the others.
    ``common`` are the reasons for which a process rejected so many samples that it stopped reading.
    """

    images: int = 0
    batches: int = 0
    checksum: float = 0.0
    outliers: tuple[DetectedOutlier, ...] = ()
    common: frozenset[OutlierReason] = frozenset()

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.images + other.images,
            self.batches + other.batches,
            self.checksum + other.checksum,
            self.outliers + other.outliers,
            self.common | other.common,
        )

    @property
    def left_out(self) -> int:
        """The outliers, and the samples that were left out because they share a batch with one."""
        return sum(len(detected.keys) for detected in self.outliers)

    @property
    def samples(self) -> int:
        """All samples that were read, those that were left out among them."""
        return self.images + self.left_out

    def common_reasons(self) -> frozenset[OutlierReason]:
        """Reasons that rejected so many samples that these are what the data look like.

        In batches that are left out as a whole, one extreme row may make many others extreme (the
        neighbours of a node), so there the batches are counted.
        """
        single = Counter(item.outlier.reason for item in self.outliers if not item.outlier.whole_batch)
        batches = Counter(
            item.outlier.reason for item in self.outliers if item.outlier.whole_batch and item.keys
        )
        common = {reason for reason, count in single.items() if count > tolerated_outliers(self.samples)}
        limit = max(1, _COMMON_BATCHES * self.batches)
        common |= {reason for reason, count in batches.items() if count > limit}
        return self.common | common - {"not finite"}  # those never count, however many they are

    def costly_outliers(self, tolerated_share: float) -> tuple[Outlier, ...]:
        """The outliers whose batches, left out as a whole, are a larger share of the data than this.

        To leave them out would change the result more than an outlier may; they are to be kept.
        Samples that are not finite never count, whatever they cost.
        """
        batches = [detected for detected in self.outliers if detected.outlier.whole_batch]
        finite = [detected for detected in batches if detected.outlier.reason != "not finite"]
        lost = sum(len(detected.keys) for detected in finite)
        return tuple(item.outlier for item in finite) if lost > tolerated_share * self.samples else ()
