"""Reading a checkpoint: ``read_checkpoint`` for the state dict in it, ``checkpoint_sha256`` for its identity."""

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
    """Read a state dict from any format that PyTorch's libraries save: torch.save files with state dicts or whole
    modules, safetensors, TorchScript, torch.export, folders of shards, Hugging Face folders, distributed checkpoints.

    The state dict may stand at the top level or under the names that common training scripts use. ``weights``
    is "auto" (averaged weights where there are any, as timm's own loader does), "model", "ema", or the name of
    an entry. Tensors are on the CPU and memory-mapped where the format permits: read them before the file
    changes. Nothing in the file is executed unless ``trust`` is set. Of a URL (``s3://…``) a temporary copy is
    read, which stays until the process ends.

    Raises CheckpointError, RemoteError.
    """
    location = Location.of(place)
    with location.urls_in_errors():
        source = find_checkpoint_files(fetch_checkpoint(location))
        stamps = stamp_checkpoint_files(source)
        content = load_checkpoint_files(source, trust=trust)
        try:
            return replace(_extract(source, content, weights, stamps), url=location.url)
        except CheckpointError:
            raise
        except Exception as error:  # a hostile pickle may hide methods of a dict or a tensor behind attributes
            raise CheckpointError(
                f"{location}: expected a state dict, found an object that cannot be searched for one "
                f"({type(error).__name__}: {error}). Save model.state_dict() with torch.save."
            ) from error


def reread_checkpoint(place: LocationLike, *, weights: str, prefix: str, trust: bool = False) -> Checkpoint:
    """The part of a file that an earlier reading took: the entry ``weights``, without ``prefix`` before its keys.

    Raises CheckpointError if it is not there any more.
    """
    found = read_checkpoint(place, weights=weights or "model", trust=trust)
    inner = prefix.removeprefix(found.prefix)
    return select_prefix(found, inner) if inner else found


def select_prefix(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """Only the tensors that stand under ``prefix``, without it; the others are counted as left out."""
    kept = {key.removeprefix(prefix): t for key, t in checkpoint.tensors.items() if key.startswith(prefix)}
    others = Counter(key.partition(".")[0] for key in checkpoint.tensors if not key.startswith(prefix))
    return replace(
        checkpoint,
        tensors=kept,
        prefix=checkpoint.prefix + prefix,
        left_out=(*checkpoint.left_out, *(f"{name} ({count} tensors)" for name, count in others.items())),
    )


def _extract(source: CheckpointFiles, content: FileContent, weights: str, stamps: tuple[FileStamp, ...]) -> Checkpoint:
    root = as_mapping(content.root)
    try:
        entry = choose_entry(root, weights, source.path)
    except CheckpointError as error:
        _require_unquantised(root, source.path, error)
        raise
    words, beside = separate_remaining_entries(root, entry)
    state = content.load(entry.state)
    wrapped, odd = _plain(state, source.path)
    tensors, prefix, counters = strip_wrappers(wrapped)
    if not entry.path:  # "epoch" and the like among the tensors themselves
        words = {key: state[key] for key in odd}
    return StoredCheckpoint(
        path=source.path,
        format=content.format,
        tensors=tensors,
        weights=entry.name,
        prefix=prefix,
        words=plain_words({**content.words, **content.load(words), **_module_words(entry, prefix)}),
        metadata=content.metadata,
        left_out=(*beside, *_other_parts(entry), *odd, *counters),
        module=_module(entry, prefix),
        stamps=stamps,
    )


def _plain(state: Mapping[str, object], where: object) -> tuple[dict[str, Tensor], list[str]]:
    try:
        return plain_tensors(state, where)
    except CheckpointError as error:
        _require_unquantised(state, where, error)
        raise


def _require_unquantised(state: object, where: object, error: CheckpointError) -> None:
    """Raise in place of ``error`` what the keys of a quantised model say better."""
    names = [name for name in state if isinstance(name, str)] if isinstance(state, Mapping) else []
    if found := missing_batch_norm(names):
        raise CheckpointError(f"{where}: expected dense tensors, found {found}") from error


def _module_words(entry: StateDictEntry, prefix: str) -> dict[str, object]:
    """What a pickled module says about itself: its class, and the drop rates of its submodules."""
    module = entry.source
    if module is None or isinstance(module, nn.Module):
        return {}
    for name in prefix.split(".")[:-1]:  # out of the wrappers whose prefix the keys lost
        module = module.state["_modules"][name] if isinstance(module, OpaqueObject) else None  # type: ignore[index]
    rates = {f"{prefix}{path}".removesuffix("."): found for path, found in module_drop_rates(module).items()}
    return {"module": {"class": module_class_name(module), "rates": rates}}


def _module(entry: StateDictEntry, prefix: str) -> nn.Module | None:
    """The trusted model itself, out of the wrappers whose prefix its keys lost."""
    return entry.source.get_submodule(prefix.rstrip(".")) if isinstance(entry.source, nn.Module) else None


def _other_parts(entry: StateDictEntry) -> list[str]:
    """The parts of a larger state dict of which the entry is one."""
    others = [key for key in entry.whole or () if key not in entry.state]
    return [f"{name} ({count} tensors)" for name, count in Counter(key.partition(".")[0] for key in others).items()]
