"""Reading the state dict in a checkpoint, and the SHA-256 that identifies the checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import CheckpointError
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.storage.contents.quantized import missing_batch_norm
from ckpt_tools.storage.contents.recorded_values import plain_words
from ckpt_tools.storage.contents.state_dict_keys import plain_tensors, strip_wrappers
from ckpt_tools.storage.contents.state_dict_search import (
    StateDictEntry,
    as_mapping,
    choose_entry,
    separate_remaining_entries,
)
from ckpt_tools.storage.files.checkpoint_files import (
    CheckpointFiles,
    checkpoint_sha256,
    find_checkpoint_files,
    load_checkpoint_files,
)
from ckpt_tools.storage.files.fetching import fetch_checkpoint
from ckpt_tools.storage.files.stamps import FileStamp, StoredCheckpoint, stamp_checkpoint_files
from ckpt_tools.storage.formats.file_formats import FileContent
from ckpt_tools.storage.formats.module_trees import module_class_name, module_drop_rates
from ckpt_tools.storage.formats.pickles import OpaqueObject

__all__ = ["checkpoint_sha256", "read_checkpoint", "reread_checkpoint", "select_prefix"]


def read_checkpoint(place: LocationLike, *, weights: str = "auto", trust: bool = False) -> Checkpoint:
    """Read a state dict from any format that PyTorch's libraries save.

    These are torch.save files with state dicts or complete modules, safetensors, TorchScript,
    torch.export, folders of shards, Hugging Face folders, and distributed checkpoints. The state
    dict may stand at the top level or under the names that common training scripts use.

    ``weights`` is "auto" (averaged weights where there are any, as timm's own loader does),
    "model", "ema", or the name of an entry. Tensors are on the CPU and memory-mapped where the
    format permits: use them before the file changes. Nothing in the file is executed unless
    ``trust`` is set. Of a URL (``s3://…``) a temporary copy is read, which stays until the process
    ends.

    Raises CheckpointError, RemoteError.
    """
    location = Location.of(place)
    with location.urls_in_errors():
        source = find_checkpoint_files(fetch_checkpoint(location))
        stamps = stamp_checkpoint_files(source)
        content = load_checkpoint_files(source, trust=trust)
        try:
            checkpoint = _extract_checkpoint(source, content, weights, stamps)
        except CheckpointError:
            raise
        except Exception as error:
            # A hostile pickle may hide methods of a dict or a tensor behind attributes.
            raise CheckpointError(
                f"{location}: expected a state dict, found an object that cannot be searched for "
                f"one ({type(error).__name__}: {error}). Save model.state_dict() with torch.save."
            ) from error
    return replace(checkpoint, url=location.url)


def reread_checkpoint(place: LocationLike, *, weights: str, prefix: str, trust: bool = False) -> Checkpoint:
    """Read the entry ``weights`` of a file once more, without ``prefix`` before its keys.

    Raises CheckpointError if it is not there any more.
    """
    # An entry at the top level has no name; "model" takes no averaged copy in its place.
    checkpoint = read_checkpoint(place, weights=weights or "model", trust=trust)
    inner_prefix = prefix.removeprefix(checkpoint.prefix)
    return select_prefix(checkpoint, inner_prefix) if inner_prefix else checkpoint


def select_prefix(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """Return a checkpoint with the tensors under ``prefix``, without the prefix in their keys.

    The other tensors are counted as left out.
    """
    items = checkpoint.tensors.items()
    other_keys = [key for key in checkpoint.tensors if not key.startswith(prefix)]
    return replace(
        checkpoint,
        tensors={key.removeprefix(prefix): value for key, value in items if key.startswith(prefix)},
        prefix=checkpoint.prefix + prefix,
        left_out=(*checkpoint.left_out, *_count_by_module(other_keys)),
    )


def _count_by_module(keys: list[str]) -> list[str]:
    """Return "name (3 tensors)" for each first part of the keys."""
    counts = Counter(key.partition(".")[0] for key in keys)
    return [f"{name} ({count} tensors)" for name, count in counts.items()]


def _extract_checkpoint(
    source: CheckpointFiles, content: FileContent, weights: str, stamps: tuple[FileStamp, ...]
) -> Checkpoint:
    root = as_mapping(content.root)
    try:
        entry = choose_entry(root, weights, source.path)
    except CheckpointError as error:
        _require_unquantised(root, source.path, error)
        raise
    words, beside = separate_remaining_entries(root, entry)
    # Stand-ins of a distributed checkpoint are read for the chosen entry and for recorded values
    # alone.
    state = content.load(entry.state)
    wrapped, other_keys = _take_tensors(state, source.path)
    tensors, prefix, counters = strip_wrappers(wrapped)
    # At the top level "epoch" and the like stand among the tensors themselves.
    if not entry.path:
        words = {key: state[key] for key in other_keys}
    return StoredCheckpoint(
        path=source.path,
        format=content.format,
        tensors=tensors,
        weights=entry.name,
        prefix=prefix,
        words=plain_words({**content.words, **content.load(words), **_describe_module(entry, prefix)}),
        metadata=content.metadata,
        left_out=(*beside, *_list_other_parts(entry), *other_keys, *counters),
        module=_trusted_module(entry, prefix),
        stamps=stamps,
    )


def _take_tensors(state: Mapping[str, object], where: object) -> tuple[dict[str, Tensor], list[str]]:
    try:
        return plain_tensors(state, where)
    except CheckpointError as error:
        _require_unquantised(state, where, error)
        raise


def _require_unquantised(state: object, where: object, error: CheckpointError) -> None:
    """Raise a CheckpointError that explains ``error``, if the keys show a quantised model."""
    names = [name for name in state if isinstance(name, str)] if isinstance(state, Mapping) else []
    if explanation := missing_batch_norm(names):
        raise CheckpointError(f"{where}: expected dense tensors, found {explanation}") from error


def _describe_module(entry: StateDictEntry, prefix: str) -> dict[str, object]:
    """Return the class of a pickled module, and the drop rates of its submodules, as words."""
    module = entry.source
    if module is None or isinstance(module, nn.Module):
        return {}
    # The keys have lost the prefixes of wrappers; the module inside them is described.
    for name in prefix.split(".")[:-1]:
        if not isinstance(module, OpaqueObject):
            return {"module": {"class": "", "rates": {}}}
        module = module.state["_modules"][name]  # type: ignore[index]
    rates = {
        f"{prefix}{path}".removesuffix("."): rates_of_module
        for path, rates_of_module in module_drop_rates(module).items()
    }
    return {"module": {"class": module_class_name(module), "rates": rates}}


def _trusted_module(entry: StateDictEntry, prefix: str) -> nn.Module | None:
    """Return the model itself of a file that is trusted, without the wrappers around it."""
    if not isinstance(entry.source, nn.Module):
        return None
    return entry.source.get_submodule(prefix.rstrip("."))


def _list_other_parts(entry: StateDictEntry) -> list[str]:
    """Return the parts of the larger state dict that are not in the entry."""
    return _count_by_module([key for key in entry.larger_state or () if key not in entry.state])
