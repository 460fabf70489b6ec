"""Conversion from file to file: a checkpoint of any format, as one safetensors file of the same
tensors.
"""

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
    """Everything the user asks of a conversion.

    ``output`` None: NAME.safetensors beside the checkpoint.
    """

    checkpoint: Location
    output: Location | None = None
    weights: str = "auto"
    trust: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    ``shared``: groups of keys whose tensors shared memory; each of them is written on its own.
    """

    checkpoint: Checkpoint
    output: Location
    source_sha256: str
    output_sha256: str
    shared: tuple[tuple[str, ...], ...]


def convert_checkpoint(request: ConvertRequest) -> Conversion:
    """Write one state dict of a checkpoint as a safetensors file.

    Every tensor comes out bit for bit, in the same order. Wrapper prefixes are removed from the
    keys. Raises any CkptToolsError; then no output is left behind.
    """
    output = request.output or _default_copy_path(request.checkpoint)
    check_output(output, request.checkpoint, overwrite=request.overwrite)
    checkpoint = read_checkpoint(request.checkpoint, weights=request.weights, trust=request.trust)
    # `ckpt-fix diff` reads from the provenance which differences to expect.
    digests = replace_tensors(
        output, checkpoint, {}, provenance={"expect": "nothing"}, overwrite=request.overwrite
    )
    shared = keys_sharing_memory(checkpoint.tensors)
    return Conversion(checkpoint, output, digests.source, digests.output, shared)


def keys_sharing_memory(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """Groups of keys whose tensors lie in the same memory, wholly or in part, in the order of the
    keys.
    """
    order = {key: position for position, key in enumerate(tensors)}
    extents = sorted(
        (tensor.data_ptr(), _end_address(tensor), key) for key, tensor in tensors.items() if tensor.numel()
    )
    # In the order of addresses, a tensor overlaps with those before it if it begins before they
    # end.
    groups: list[list[str]] = []
    group_end = 0
    for start, end, key in extents:
        if start < group_end:
            groups[-1].append(key)
        else:
            groups.append([key])
        group_end = max(group_end, end)
    shared = [tuple(sorted(group, key=order.__getitem__)) for group in groups if len(group) > 1]
    return tuple(sorted(shared, key=lambda group: order[group[0]]))


def _end_address(tensor: Tensor) -> int:
    """The address behind the last element. Views may have gaps, so their size does not tell it."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _default_copy_path(checkpoint: Location) -> Location:
    output = default_output_path(checkpoint)
    if output.path == checkpoint.path.absolute():
        raise OutputError(
            f"{checkpoint}: expected another name for the copy, found a .safetensors file already. "
            f"Give one with -o, e.g. -o {output.path.stem}.copy.safetensors."
        )
    return output
