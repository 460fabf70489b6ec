"""Decode JPEG files with torchvision: the same pixels as PIL in three quarters of the time."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["decode_jpeg"]


def decode_jpeg(file: Path | BytesIO, size: tuple[int, int]) -> Tensor | None:
    """Decode a colour JPEG of this width and height to uint8 (3, H, W), not rotated.

    Returns None where PIL has to read the file; PIL then also says what is wrong with it.
    """
    # Torchvision is used only if something else, such as the model, has imported it: importing it
    # takes as long as decoding thousands of files. A later version will not have this decoder.
    decode = getattr(sys.modules.get("torchvision.io"), "decode_jpeg", None)
    if decode is None:
        return None
    try:
        content = (
            np.fromfile(file, np.uint8)
            if isinstance(file, Path)
            else np.frombuffer(file.getbuffer(), np.uint8)
        )
        pixels: Tensor = decode(torch.from_numpy(content), mode="RGB")
    except (RuntimeError, ValueError, OSError, Warning):
        return None
    # A file whose header and content disagree about the size is left to PIL.
    return pixels if pixels.shape == (3, size[1], size[0]) else None
