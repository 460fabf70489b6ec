"""What a file's name suggests about its architecture, where the tensors fit several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ckpt_tools.identify.candidate import Candidate

# torchvision publishes weights with a part of their hash in the name: resnet50-0676ba61.pth.
_PUBLISHED_BY_TORCHVISION = re.compile(r"-[0-9a-f]{8}\.\w+$")


def guess_by_file_name(path: Path, candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate whose name, or a twin's, stands in the name of the file, else of its
    folder.

    The longest name counts: `tf_efficientnet_b0.pt` is not the `efficientnet_b0` that its name
    contains. Returns None if no name or several equally long ones stand there.
    """
    # A file is often named `model_best.pth`, in a folder that is named after the model.
    for text in (path.name, path.absolute().parent.name):
        lengths = [
            max(matched_name_length(text, name) for name in candidate.names) for candidate in candidates
        ]
        longest = max(lengths, default=0)
        if longest and lengths.count(longest) == 1:
            return candidates[lengths.index(longest)]
    return None


def name_preference(path: Path, architecture: str) -> tuple[int, bool, int, str]:
    """Return a sort key for the names of architectures that compute the same function.

    The name that stands in the file's name comes first, then timm's, then the shortest.
    """
    library, _, name = architecture.partition(":")
    preferred = "torchvision" if _PUBLISHED_BY_TORCHVISION.search(path.name) else "timm"
    length = matched_name_length(path.name, architecture)
    return (-length, library != preferred, len(name), architecture)


def matched_name_length(text: str, architecture: str) -> int:
    """Return the length of the architecture's bare name if the text contains it, else 0.

    Letters or digits right before or behind it make it another name: `resnet50` is not in
    `resnet50x`.
    """
    name = _normalise(architecture.rpartition(":")[2])
    pattern = rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])"
    return len(name) if re.search(pattern, _normalise(text)) else 0


def _normalise(text: str) -> str:
    return text.lower().replace("-", "_")
