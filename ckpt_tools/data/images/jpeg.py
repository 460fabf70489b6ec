"""JPEG files by torchvision's decoder: PIL's pixels in three quarters of the time."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["decode_jpeg"]


def decode_jpeg(file: Path | BytesIO, size: tuple[int, int]) -> Tensor | None:
    """Uint8 (3, H, W) of a colour JPEG of this width and height, unrotated; None where PIL has to read it.

    Torchvision is used only if something else, say the model, has imported it: that takes as long
    as decoding thousands of files. Its decoder is announced to be removed; then PIL reads
    everything. PIL also says what is wrong with a file.
    """
    decode = getattr(sys.modules.get("torchvision.io"), "decode_jpeg", None)
    if decode is None:
        return None
    try:
        content = np.fromfile(file, np.uint8) if isinstance(file, Path) else np.frombuffer(file.getbuffer(), np.uint8)
        pixels: Tensor = decode(torch.from_numpy(content), mode="RGB")
    except (RuntimeError, ValueError, OSError, Warning):
        return None
    return pixels if pixels.shape == (3, size[1], size[0]) else None
