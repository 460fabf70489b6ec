"""Files and folders that are no checkpoints of PyTorch: what they are, and what to do about it.

Each table has patterns of first bytes or of names, a description to stand behind "found", and
advice.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from pathlib import Path

from ckpt_tools.errors import CheckpointError

__all__ = [
    "foreign_archive_error",
    "foreign_file_error",
    "foreign_folder_error",
    "unpacked_archive_error",
]

_FRESH = "The download gave an error page; fetch the file again."
_UNPACK = "Unpack it first."
_CONVERT = "Convert its weights to PyTorch first (a state dict saved with torch.save or as safetensors)."
_TF = (
    "Convert its weights to PyTorch first, e.g. with from_pretrained(..., from_tf=True) in "
    "transformers, and save them."
)
_FLAX = (
    "Convert its weights to PyTorch first, e.g. with from_pretrained(..., from_flax=True) in transformers."
)
_GGUF = "It holds quantised weights of a language model; give the checkpoint that it was converted from."
_ONNX = (
    "ONNX keeps no training state: export folds BatchNorm away. Give the checkpoint that it was "
    "exported from."
)

_COREML = "Give the checkpoint that it was converted from: conversion folds BatchNorm away."
_UNPACKED = (
    "torch.load does not read it either. Give the file it was unpacked from, or pack the folder again: "
    "zip -0 -r model.pt {name}"
)

# The first bytes of files, matched from the start; the first match counts.
_SIGNATURES = (
    (
        rb"version https://git-lfs",
        "a Git LFS pointer",
        "Fetch the file itself with `git lfs pull`.",
    ),
    (rb"\xff\xd8\xff", "a JPEG image", ""),
    (rb"\x89PNG", "a PNG image", ""),
    (rb"%PDF", "a PDF document", ""),
    (rb"\x89HDF", "an HDF5 file, as Keras writes it", _TF),
    (rb"\x93NUMPY", "a numpy array", ""),
    (rb"GGUF", "a GGUF file", _GGUF),
    (rb"(?s).{4}TFL3", "a TensorFlow Lite model", _TF),
    (rb"(?s).{4}ET\d\d", "an ExecuTorch program", "Give the checkpoint that it was exported from."),
    # After the version comes a message that begins with the description of an input, where ONNX has
    # the name of a program, and a SavedModel, always of version 1, its graph.
    (rb"(?s)\x08[\x02-\x1f]\x12[\x80-\xff]{0,4}[\x00-\x7f]\x0a", "a Core ML model", _COREML),
    (rb"program\(1\.", "a compiled Core ML model", _COREML),
    (rb"\x08\x01\x12", "a TensorFlow SavedModel", _TF),
    (rb"\x08[\x02-\x14][\x12\x1a\x22\x28\x32\x3a]", "an ONNX model", _ONNX),
    (
        rb"[\x81-\x8f][\xa1-\xbf][ -~]|\xde\x00.[\xa1-\xbf][ -~]",
        "a msgpack file, as Flax writes it",
        _FLAX,
    ),
    (rb"\x1f\x8b", "a gzip archive", _UNPACK),
    (rb"BZh", "a bzip2 archive", _UNPACK),
    (rb"7z\xbc\xaf", "a 7-zip archive", _UNPACK),
    (rb"\xfd7zXZ", "an xz archive", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (rb"Rar!", "a RAR archive", _UNPACK),
    (rb"(?i)\s*<(!doctype|html)", "a web page", _FRESH),
    (rb"\s*<\?xml", "an XML file", ""),
)

# The names of a zip archive's records.
_ARCHIVES = (
    (r"model\.weights\.h5$", "a Keras model", _TF),
    (
        r"\.npy$",
        "an archive of numpy arrays (.npz)",
        "Save them as a state dict: torch.save({name: tensor, …}, path).",
    ),
    (
        r"(^|/)\.data/extern_modules$",
        "a torch.package archive",
        "It holds code; torch.save the model's state_dict().",
    ),
    (
        r"^([^/]+/)?model\.json$",
        "a TorchScript archive of PyTorch 1.3 or older",
        "Load and save it with PyTorch 1.4–2.4.",
    ),
    (r"(^|/)mlmodel$|\.mlmodel$", "a Core ML package", _COREML),
)

# The names of the files in a folder.
_FOLDERS = (
    (r"^(coremldata\.bin|model\.mil)$", "a compiled Core ML model", _COREML),
    (r"^Manifest\.json$", "a Core ML package", _COREML),
    (r"^saved_model\.pb$", "a TensorFlow SavedModel", _TF),
    (r"\.data-\d{5}-of-\d{5}$", "a TensorFlow checkpoint", _TF),
    (r"^(_METADATA|_CHECKPOINT_METADATA|manifest\.ocdbt)$", "an Orbax checkpoint of JAX", _CONVERT),
    (
        r"^(flax_model\.msgpack|tf_model\.h5)$",
        "a Hugging Face folder without PyTorch weights",
        _FLAX,
    ),
    (
        r"^(zero_to_fp32\.py|latest)$",
        "a DeepSpeed checkpoint",
        "Give its …/mp_rank_00_model_states.pt (ZeRO stage 1 or 2), or run zero_to_fp32.py and give "
        "what it writes.",
    ),
    (
        r"\.distcp$",
        "shards of a distributed checkpoint without their .metadata",
        "Fetch the whole folder again.",
    ),
)


def foreign_file_error(path: Path, head: bytes) -> CheckpointError:
    """Return the error for a file that is no checkpoint, from its first bytes (about 512)."""
    matches = [entry[1:] for entry in _SIGNATURES if re.match(entry[0], head)]
    # Version 1 of Core ML begins as a SavedModel does, so that its name has to tell.
    if path.suffix == ".mlmodel":
        matches = [("a Core ML model", _COREML)]
    description, advice = matches[0] if matches else (_describe_unknown_bytes(head), "")
    return CheckpointError(
        f"{path}: expected a checkpoint (torch.save or safetensors), found {description}. "
        + (advice or "Give the file that the training script saved.")
    )


def foreign_archive_error(path: Path, names: Collection[str]) -> CheckpointError:
    """Return the error for a zip archive that is no checkpoint, from the names of its records."""
    description, advice = _match_names(_ARCHIVES, names) or (
        "a zip archive that torch.save did not write",
        "If it holds a checkpoint, unpack it and give the file inside.",
    )
    return CheckpointError(f"{path}: expected a checkpoint, found {description}. {advice}")


def unpacked_archive_error(folder: Path) -> CheckpointError | None:
    """Return the error for a folder into which a file of torch.save was unpacked; None for another.

    The archive holds one folder, which people may give as well as the one around it.
    """
    inner = [path for path in folder.iterdir() if path.is_dir()]
    for archive in (folder, *(inner if len(inner) == 1 else ())):
        if (
            (archive / "data.pkl").is_file()
            and (archive / "data").is_dir()
            and (archive / "version").is_file()
        ):
            return CheckpointError(
                f"{archive}: expected a checkpoint, found the unpacked archive of torch.save (a folder "
                f"with data.pkl). {_UNPACKED.format(name=shlex.quote(archive.name))}"
            )
    return None


def foreign_folder_error(folder: Path, names: Collection[str]) -> CheckpointError | None:
    """Return the error for a folder in another library's layout, from the names in it.

    For any other folder this is None.
    """
    match = _match_names(_FOLDERS, names)
    if match is None:
        return None
    description, advice = match
    return CheckpointError(f"{folder}: expected a checkpoint, found {description}. {advice}")


def _match_names(table: tuple[tuple[str, str, str], ...], names: Collection[str]) -> tuple[str, str] | None:
    for pattern, description, advice in table:
        if any(re.search(pattern, name) for name in names):
            return description, advice
    return None


def _describe_unknown_bytes(head: bytes) -> str:
    if head[257:262] == b"ustar":
        return "a tar archive of other files"
    if b"\0" in head:
        return _describe_binary(head)
    try:
        head.decode()
    except UnicodeDecodeError as error:
        # The end of ``head`` may cut a character in two, which does not make the text binary.
        if error.start < len(head) - 4:
            return _describe_binary(head)
    return "a text file"


def _describe_binary(head: bytes) -> str:
    if not any(head):
        return "nothing but zeros at its start, as an interrupted copy leaves them"
    return f"bytes of no known format, starting with {head[:8].hex(' ')}"
