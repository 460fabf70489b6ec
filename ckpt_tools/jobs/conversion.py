"""Conversion from file to file: any checkpoint that can be read, as one safetensors file of the same tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import OutputError
from ckpt_tools.jobs.outputs import default_output_path
from ckpt_tools.location import Location
from ckpt_tools.storage.output.checkpoint_writer import check_output, replace_tensors
from ckpt_tools.storage.reading import read_checkpoint


@dataclass(frozen=True)
class ConvertRequest:
    """Everything the user asks for. ``output`` None: NAME.safetensors beside the checkpoint."""

    checkpoint: Location
    output: Location | None = None
    weights: str = "auto"
    trust: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Conversion:
    """What happened. ``shared``: groups of keys whose tensors shared memory and are now written once each."""

    checkpoint: Checkpoint
    output: Location
    source_sha256: str
    output_sha256: str
    shared: tuple[tuple[str, ...], ...]


def convert_checkpoint(request: ConvertRequest) -> Conversion:
    """Write one state dict of a checkpoint as a safetensors file: every tensor bit for bit, in the same order.

    Wrapper prefixes are removed from the keys. Raises any CkptToolsError; then no output is left behind.
    """
    output = request.output or _default(request.checkpoint)
    check_output(output, request.checkpoint, overwrite=request.overwrite)
    checkpoint = read_checkpoint(request.checkpoint, weights=request.weights, trust=request.trust)
    digests = replace_tensors(output, checkpoint, {}, provenance={"expect": "nothing"}, overwrite=request.overwrite)
    return Conversion(checkpoint, output, digests.source, digests.output, keys_sharing_memory(checkpoint.tensors))


def keys_sharing_memory(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Groups of keys whose tensors lie in the same memory, wholly or in part, in the order of the keys."""
    order = {key: place for place, key in enumerate(tensors)}
    extents = sorted((tensor.data_ptr(), _end(tensor), key) for key, tensor in tensors.items() if tensor.numel())
    groups: list[list[str]] = []
    reach = 0
    for start, end, key in extents:
        if start < reach:
            groups[-1].append(key)
        else:
            groups.append([key])
        reach = max(reach, end)
    found = [tuple(sorted(group, key=order.__getitem__)) for group in groups if len(group) > 1]
    return tuple(sorted(found, key=lambda group: order[group[0]]))


def _end(tensor: Tensor) -> int:
    """The address behind the last element; views may have gaps."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _default(checkpoint: Location) -> Location:
    output = default_output_path(checkpoint)
    if output.path == checkpoint.path.absolute():
        raise OutputError(
            f"{checkpoint}: expected another name for the copy, found a .safetensors file already. "
            f"Give one with -o, e.g. -o {output.path.stem}.copy.safetensors."
        )
    return output
