"""What a file's name suggests where the tensors leave a choice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ckpt_tools.identify.candidate import Candidate

_HASHED = re.compile(r"-[0-9a-f]{8}\.\w+$")  # torchvision's published weights: resnet50-0676ba61.pth


def guess_by_file_name(path: Path, candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate whose name, or a twin's, stands in the name of the file or its folder; None if that is unclear.

    The longest name counts: ``tf_efficientnet_b0.pt`` is not the ``efficientnet_b0`` that stands in it.
    """
    for text in (path.name, path.absolute().parent.name):
        lengths = [max(matched_name_length(text, name) for name in candidate.names) for candidate in candidates]
        best = max(lengths, default=0)
        if best and lengths.count(best) == 1:
            return candidates[lengths.index(best)]
    return None


def name_preference(path: Path, architecture: str) -> tuple[int, bool, int, str]:
    """A sort key for names of one function: what the file is called, timm before others, short before long."""
    library, _, name = architecture.partition(":")
    first = "torchvision" if _HASHED.search(path.name) else "timm"
    return (-matched_name_length(path.name, architecture), library != first, len(name), architecture)


def matched_name_length(text: str, architecture: str) -> int:
    """The length of the architecture's bare name if it stands in a text as words of its own, else 0."""
    name = _plain(architecture.rpartition(":")[2])
    found = re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", _plain(text))
    return len(name) if found and name else 0


def _plain(text: str) -> str:
    return text.lower().replace("-", "_")
