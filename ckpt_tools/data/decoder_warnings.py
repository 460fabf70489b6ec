"""Silence the warnings of image decoders.

They tell of odd EXIF data or palettes in thousands of files. The user cannot act on them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

__all__ = ["silence_decoder_warnings"]

_RULE = ("ignore", None, Warning, re.compile(r"PIL\.|torchvision\.io\."), 0)


@contextmanager
def silence_decoder_warnings() -> Iterator[None]:
    """Ignore warnings of the modules that decode images, in all threads. Other filters stay."""
    # warnings.catch_warnings would undo filters that another thread has set in the meantime.
    filters = cast("list[object]", warnings.filters)
    filters.insert(0, _RULE)  # the first filter that matches decides
    try:
        yield
    finally:
        # In the meantime another thread may have put a different list in place of the first.
        filters = cast("list[object]", warnings.filters)
        if _RULE in filters:
            filters.remove(_RULE)
