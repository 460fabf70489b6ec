"""Malicious files that take a second each."""

from __future__ import annotations

from malicious import PICKLES

# A second or more each time; what is deep for one reader is as deep for the next.
SLOW = frozenset(
    label for label in PICKLES if any(words in label for words in ("000 deep", "again and again", "nested t"))
)
