"""What is fuzzed: every function that reads a file of somebody else's, as one call on a path."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import torchvision.io  # noqa: F401  its JPEG decoder is taken where it is there
from fsspec.implementations.memory import MemoryFileSystem
from torch import Tensor, nn

from ckpt_tools.contract import Checkpoint, InputSpec
from ckpt_tools.data.data_source import Source, open_source
from ckpt_tools.data.label_files import file_labels, read_label_file
from ckpt_tools.data.labelled_stream import labelled_batches
from ckpt_tools.data.labels import array_labels, folder_labels, read_class_map
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import ArchitectureError, CkptToolsError
from ckpt_tools.identify import plugins
from ckpt_tools.identify.candidate import Candidate, fit_candidate
from ckpt_tools.identify.recipe import recorded_recipes
from ckpt_tools.jobs.conversion import keys_sharing_memory
from ckpt_tools.report.pages.html_page import folder_html
from ckpt_tools.report.pages.markdown_page import folder_markdown
from ckpt_tools.report.records.manifest import Manifest, parse_records
from ckpt_tools.report.text.folder_text import folder_text
from ckpt_tools.storage.discovery import find_checkpoints
from ckpt_tools.storage.provenance import checkpoint_provenance, read_provenance_entry
from ckpt_tools.storage.reading import read_checkpoint
from ckpt_tools.storage.tensor_bytes import raw_bytes
from fuzz.listings import read_listing

__all__ = ["READERS", "SLOW", "Reader"]

Reader = Callable[[Path], None]
_TOUCHED = 1 << 16  # bytes of a tensor up to which all of it is looked at


def _checkpoint(path: Path) -> None:
    checkpoint = read_checkpoint(path)
    for tensor in checkpoint.tensors.values():
        _touch(tensor)
    keys_sharing_memory(checkpoint.tensors)
    checkpoint_provenance(checkpoint)
    if path.is_file():
        read_provenance_entry(path)


def _touch(tensor: Tensor) -> None:
    """Read both ends of a tensor.

    A view that leaves its storage would be read beyond its end here.
    """
    if not tensor.numel():
        return
    if tensor.nbytes <= _TOUCHED:
        raw_bytes(tensor)
    else:
        raw_bytes(tensor[tuple(slice(0, 1) for _ in tensor.shape)])
        raw_bytes(tensor[tuple(slice(-1, None) for _ in tensor.shape)])


def _folder(path: Path) -> None:
    """As a folder run searches it."""
    for checkpoint in find_checkpoints([path]):
        try:
            _checkpoint(checkpoint.location.path)
        except CkptToolsError:
            continue


def _array(path: Path) -> None:
    source = open_source(str(path), limit=64)
    _read(source, None if source.is_preprocessed else InputSpec((3, 8, 8)))
    if source.array.labels is not None:  # type: ignore[attr-defined]
        array_labels(source.array)  # type: ignore[attr-defined]


def _read(source: Source, spec: InputSpec | None) -> None:
    for _ in islice(source.batches(spec, Reading(batch_size=16, workers=0)), 4):
        pass


def _dataset(name: str) -> Reader:
    def read(path: Path) -> None:
        source = open_source(f"{name}:{path}", limit=64)
        _read(source, InputSpec((3, 32, 32)))
        array_labels(source.array)  # type: ignore[attr-defined]

    return read


def _images(path: Path) -> None:
    source = open_source(str(path))
    _read(source, InputSpec((3, 16, 16)))
    folder_labels(path, source.names, None)  # type: ignore[attr-defined]


def _read_labelled(spec: str) -> None:
    source = open_source(spec)
    for _ in islice(labelled_batches(source, InputSpec((3, 16, 16)), Reading(batch_size=16, workers=0)), 4):
        pass


def _tars(path: Path) -> None:
    """WebDataset shards on disk."""
    _read_labelled(str(path))


def _behind_url(path: Path) -> None:
    """The same files in a store, which can only be read forward or one by one."""
    store = MemoryFileSystem()
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            store.pipe_file(
                f"/{path.name}/{file.relative_to(path)}" if path.is_dir() else f"/{path.name}",
                file.read_bytes(),
            )
    _read_labelled(f"memory://{path.name}")


def _class_map(path: Path) -> None:
    read_class_map(path)


def _label_file(path: Path) -> None:
    file_labels(path.parent, ["a.png", "sub/b.png"], read_label_file(path), None)


def _manifest(path: Path) -> None:
    """A later run takes over what an earlier one recorded, and its report with it."""
    log = Manifest(path)
    records = list(parse_records(path.read_bytes()))
    for record in records:
        log.recorded_output(Path(str(record.get("output"))))
    records += [log.add_record({**record, "status": "done before"}) for record in records]
    log.publish()
    folder_markdown(records)
    folder_html(records)
    folder_text(records, path)


def _words(path: Path) -> None:
    """What a checkpoint says of its model goes to every adapter, and from there to a constructor."""
    try:
        words = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        return
    if not isinstance(words, dict):
        return
    stranger = Checkpoint(path, "torch", _model().state_dict(), words=words)
    for adapter, recipe in recorded_recipes(stranger):
        with contextlib.suppress(ArchitectureError):  # as a run does, which then tries what else may fit
            fit_candidate(stranger, Candidate(adapter, recipe, "checkpoint"), {})
    for prefix in ("timm", "torchvision"):
        plugins.adapter(prefix).input_spec(_model(), "resnet18", words)


_MODELS: list[nn.Module] = []


def _model() -> nn.Module:
    if not _MODELS:
        _MODELS.append(plugins.adapter("timm").build("test_resnet", {}))
    return _MODELS[0]


READERS: Mapping[str, Reader] = {
    **dict.fromkeys(
        (
            "torch.save",
            "legacy",
            "tar",
            "pickle",
            "TorchScript",
            "export",
            "distributed",
            "safetensors",
            "ranks",
            "shards",
            "hub",
        ),
        _checkpoint,
    ),
    "malicious": _checkpoint,
    "folder": _folder,
    **dict.fromkeys(("npy", "npz", "array .pt", "array .safetensors"), _array),
    **{name: _dataset(name) for name in ("cifar10", "cifar100", "mnist", "svhn")},
    "images": _images,
    "tars": _tars,
    "streamed tars": _behind_url,
    "streamed images": _behind_url,
    "class map": _class_map,
    "label file": _label_file,
    "listing": read_listing,
    "manifest": _manifest,
    "words": _words,
}

SLOW: Mapping[str, float] = {
    "words": 0.05,
    "manifest": 0.25,
    "listing": 0.1,
    **dict.fromkeys(
        ("folder", "distributed", "shards", "malicious", "streamed tars", "streamed images"), 0.5
    ),
}
"""Readers that get a smaller share of the cases: they work in a larger one."""
