"""How much of the data was read, and which samples of it did not count."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ckpt_tools.contract import OutlierReason
from ckpt_tools.reestimate.screening import DetectedOutlier, tolerated_outliers


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
    def samples(self) -> int:
        """All samples that were read, outliers among them."""
        return self.images + len(self.outliers)

    def common_reasons(self) -> frozenset[OutlierReason]:
        """Reasons that rejected so many samples that these are what the data look like."""
        reasons = Counter(detected.outlier.reason for detected in self.outliers)
        del reasons["not finite"]  # those never count, however many they are
        limit = tolerated_outliers(self.samples)
        return self.common | {reason for reason, count in reasons.items() if count > limit}
