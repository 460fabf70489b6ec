"""Decoders' warnings are not passed on: odd EXIF or palettes in thousands of files, and nothing to act on."""

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
    """Ignores warnings of the modules that decode, in all threads; everybody else's filters stay as they are."""
    # warnings.catch_warnings would put back what another thread has changed in the meantime
    filters = cast("list[object]", warnings.filters)
    filters.insert(0, _RULE)
    try:
        yield
    finally:
        filters = cast("list[object]", warnings.filters)
        if _RULE in filters:
            filters.remove(_RULE)
