"""Telling by names alone which files of a folder make up its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckpt_tools.paths import name_fault
from ckpt_tools.storage.dcp.assembly import is_rank_file
from ckpt_tools.storage.dcp.dcp_folder import METADATA_NAME, SHARD_SUFFIX
from ckpt_tools.storage.files.sidecar import SIDECAR_NAMES, find_hub_weights, is_trainer_file

__all__ = [
    "CHECKPOINT_SUFFIXES",
    "INDEX_SUFFIX",
    "find_weight_candidates",
    "is_checkpoint_related",
    "list_checkpoint_members",
    "read_shard_names",
]

INDEX_SUFFIX = ".index.json"
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors", ".pt2", ".pkl")


def find_weight_candidates(names: Sequence[str]) -> list[str]:
    """Return the files that may be the weights of a folder's checkpoint, or their index.

    This is one file if the choice is clear, and none if there is no checkpoint.
    """
    if hub := find_hub_weights(list(names)):
        return [hub]
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    # Hugging Face repositories often hold the same weights in both formats.
    if len(indices) > 1:
        indices = [name for name in indices if "safetensors" in name] or indices
    return indices or [
        name for name in names if name.endswith(CHECKPOINT_SUFFIXES) and not is_trainer_file(name)
    ]


def list_checkpoint_members(names: Sequence[str]) -> list[str]:
    """Return the files of a folder's checkpoint, as far as names tell.

    They are all files of a distributed checkpoint, those of all ranks, the weights, or the index,
    whose content names the shards. The list is empty where the choice is not clear.
    """
    if METADATA_NAME in names:
        return [name for name in names if name == METADATA_NAME or name.endswith(SHARD_SUFFIX)]
    if ranks := [name for name in names if is_rank_file(name)]:
        return ranks
    candidates = find_weight_candidates(names)
    return candidates if len(candidates) == 1 else []


def is_checkpoint_related(name: str) -> bool:
    """Return whether a file can be a checkpoint, a part of one, or a description of one."""
    suffixes = (*CHECKPOINT_SUFFIXES, INDEX_SUFFIX, SHARD_SUFFIX)
    return name.lower().endswith(suffixes) or name in (METADATA_NAME, *SIDECAR_NAMES)


def read_shard_names(index: Path) -> list[str]:
    """Return the names of the shards that an index lists, sorted.

    Names that could lead out of the index's folder are left out, and an index that cannot be read
    gives none: whoever loads the checkpoint reports what is wrong.
    """
    try:
        content = json.loads(index.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    names = shard_of.values() if isinstance(shard_of, Mapping) else ()
    return sorted({name for name in names if isinstance(name, str) and name_fault(name) is None})
