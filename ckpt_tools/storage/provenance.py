"""What an output file says about where it comes from, kept in its safetensors metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ckpt_tools.contract import Checkpoint
from ckpt_tools.storage.content import safetensors_header
from ckpt_tools.storage.fetching import peek_header
from ckpt_tools.version import VERSION

__all__ = ["output_metadata", "provenance", "recorded"]

_ENTRY = "ckpt_tools"


def provenance(checkpoint: Checkpoint) -> dict[str, object] | None:
    """What this tool wrote about a checkpoint that is its own output; None for anybody else's.

    ``source_sha256``, ``weights`` and ``prefix`` tell which entry of which file was taken, if one was; ``earlier`` is
    the source's own provenance if that was an output as well.
    """
    return _parsed(checkpoint.metadata)


def recorded(path: Path) -> dict[str, object] | None:
    """The same of a safetensors file, from its header alone; None where there is no such file or header.

    Of a remote file nothing but the header is read. Raises RemoteError.
    """
    try:
        if not path.exists():
            peek_header(path)
        if not path.is_file():  # a pipe would be waited for
            return None
        metadata = safetensors_header(path).get("__metadata__")
    except (OSError, ValueError, RecursionError, MemoryError):
        return None
    return _parsed(metadata) if isinstance(metadata, dict) else None


def _parsed(metadata: Mapping[str, str]) -> dict[str, object] | None:
    try:
        found = json.loads(metadata.get(_ENTRY, ""))
    except (ValueError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def output_metadata(
    checkpoint: Checkpoint | None, said: Mapping[str, object], source_sha256: str = ""
) -> dict[str, str]:
    """Metadata of an output: all of the source's, ``format: pt``, and one entry with the provenance.

    ``checkpoint`` None: the output has no source, and its provenance names none.
    """
    entry = {**said, "version": VERSION}
    if checkpoint is not None:
        entry |= {
            # the folder is nobody's business; a name is bytes, a header UTF-8
            "source": os.fsencode(checkpoint.path.name).decode(errors="replace"),
            "source_sha256": source_sha256,
            "weights": checkpoint.weights,
            "prefix": checkpoint.prefix,
        }
        if earlier := provenance(checkpoint):
            entry["earlier"] = earlier
    # JSON knows neither NaN nor infinity.
    clean = json.loads(json.dumps(entry, default=str), parse_constant=lambda _: None)
    kept = {} if checkpoint is None else checkpoint.metadata
    return {**kept, "format": "pt", _ENTRY: json.dumps(clean, ensure_ascii=False)}
