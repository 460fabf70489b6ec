"""Comparing two checkpoints bit by bit: which tensors differ, in what, and by how much."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import CheckpointError
from ckpt_tools.location import LocationLike
from ckpt_tools.storage.provenance import checkpoint_provenance
from ckpt_tools.storage.reading import read_checkpoint, reread_checkpoint
from ckpt_tools.storage.tensor_bytes import equal_bytes, raw_bytes

__all__ = [
    "Comparison",
    "Expectation",
    "TensorChange",
    "compare_checkpoints",
    "compare_files",
    "same_bytes",
]

Expectation = Literal["nothing", "variance", "mean+variance", "init", "any"]

# The last parts of the keys whose values may differ.
_MAY_CHANGE: Mapping[str, tuple[str, ...]] = {
    "nothing": (),
    "variance": ("running_var",),
    "mean+variance": ("running_var", "running_mean"),
}


@dataclass(frozen=True)
class TensorChange:
    """One tensor that differs; ``before`` and ``after`` describe its type and shape.

    ``relative`` is the largest |after − before| / |before| over its elements. It is infinite where
    ``before`` is 0 or a value became NaN, and None if types or shapes differ.
    """

    key: str
    what: Literal["dtype", "shape", "values"]
    before: str
    after: str
    relative: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All differences between two checkpoints.

    Equal means equal bytes, so a NaN equals the same NaN.
    """

    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    changes: tuple[TensorChange, ...]
    identical: int
    same_order: bool  # of the keys that both have

    def unexpected_differences(self, expect: Expectation, keys: Collection[str] = ()) -> tuple[str, ...]:
        """Return a sentence for each difference that ``expect`` does not allow.

        "variance" allows new values of ``running_var``, "mean+variance" also those of
        ``running_mean``, and "init" those of ``keys``. "nothing" allows no difference, and "any"
        all of them.
        """
        if expect == "any":
            return ()
        return (
            *(f"{key}: missing from the second" for key in self.only_before),
            *(f"{key}: only in the second" for key in self.only_after),
            *(_sentence(change) for change in self.changes if not _is_allowed(change, expect, keys)),
            *(() if self.same_order else ("the keys stand in another order",)),
        )


def compare_checkpoints(before: Checkpoint, after: Checkpoint) -> Comparison:
    """Compare the state dicts of two checkpoints tensor by tensor, in the order of the first."""
    common = [key for key in before.tensors if key in after.tensors]
    pairs = ((key, before.tensors[key], after.tensors[key]) for key in common)
    changes = tuple(change for pair in pairs if (change := _find_change(*pair)) is not None)
    return Comparison(
        only_before=tuple(key for key in before.tensors if key not in after.tensors),
        only_after=tuple(key for key in after.tensors if key not in before.tensors),
        changes=changes,
        identical=len(common) - len(changes),
        same_order=common == [key for key in after.tensors if key in before.tensors],
    )


def compare_files(
    before: LocationLike,
    after: LocationLike,
    expect: str = "auto",
    *,
    weights: str = "auto",
    trust: bool = False,
) -> tuple[Comparison, Expectation, tuple[str, ...]]:
    """Compare two files.

    Return the comparison, what was expected to differ, and a sentence for what else does.

    ``expect`` and ``weights`` "auto": if ``after`` is an output of this tool, it records which
    weights of its source it was made from and what may differ. "init" allows new values of the
    weights that an initialised file lists as rewritten, and zeros in the biases that it lists as
    zeroed. Raises CheckpointError.
    """
    new = read_checkpoint(after, trust=trust)
    provenance = checkpoint_provenance(new) or {}
    expectation = cast("Expectation", expect)
    if expect == "auto":
        expectation = _recorded_expectation(provenance)
    rewritten, zeroed = _listed_keys(provenance, after) if expectation == "init" else ((), ())
    old = _read_source(before, provenance, weights, trust)
    comparison = compare_checkpoints(old, new)
    violations = (
        *_describe_wrong_entries(new.tensors, rewritten, zeroed),
        *comparison.unexpected_differences(expectation, {*rewritten, *zeroed}),
    )
    return comparison, expectation, violations


def _recorded_expectation(provenance: Mapping[str, object]) -> Expectation:
    """Return what may differ between an output with this provenance and its source."""
    if provenance.get("expect") in ("init", "nothing"):
        return cast("Expectation", provenance["expect"])
    statistics = str(provenance.get("statistics"))
    return cast("Expectation", statistics) if statistics in _MAY_CHANGE else "variance"


def _listed_keys(
    provenance: Mapping[str, object], path: LocationLike
) -> tuple[list[str], list[str]]:
    """Return the keys of the rewritten weights, and of the biases that were set to zero.

    Raises CheckpointError for a file that lists none.
    """
    rewritten, zeroed = provenance.get("rewritten"), provenance.get("zeroed")
    is_initialised = provenance.get("expect") == "init"
    if not is_initialised or not isinstance(rewritten, list) or not isinstance(zeroed, list):
        raise CheckpointError(
            f"{path}: expected an output of init-rewrite, which lists the weights it rewrote, "
            "found no such list. Compare with --expect auto, or with --expect any to see what "
            "differs."
        )
    return [str(key) for key in rewritten], [str(key) for key in zeroed]


def _describe_wrong_entries(
    tensors: Mapping[str, Tensor], rewritten: Collection[str], zeroed: Collection[str]
) -> tuple[str, ...]:
    """Return a sentence for each entry of the lists that is not what an initialisation makes.

    Otherwise a file could list any key, and hide that its tensor was changed.
    """
    vectors = [key for key in rewritten if key in tensors and tensors[key].ndim < 2]
    filled = [key for key in zeroed if key in tensors and bool(tensors[key].any())]
    no_weight = "listed as a rewritten weight, but has fewer than two dimensions"
    no_zeros = "listed as a bias set to zero, but holds other values"
    return (*(f"{key}: {no_weight}" for key in vectors), *(f"{key}: {no_zeros}" for key in filled))


def _read_source(
    path: LocationLike, provenance: Mapping[str, object], weights: str, trust: bool
) -> Checkpoint:
    """Read the weights of a file that an output with this provenance was made from."""
    if weights == "auto" and "weights" in provenance:
        recorded, prefix = str(provenance["weights"]), str(provenance.get("prefix", ""))
        try:
            return reread_checkpoint(path, weights=recorded, prefix=prefix, trust=trust)
        except CheckpointError:
            pass  # this file is another one than the recorded source
    return read_checkpoint(path, weights=weights, trust=trust)


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same type, shape and bits."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return equal_bytes(raw_bytes(first), raw_bytes(second))


def _find_change(key: str, first: Tensor, second: Tensor) -> TensorChange | None:
    before, after = _describe(first), _describe(second)
    if first.dtype != second.dtype:
        return TensorChange(key, "dtype", before, after)
    if first.shape != second.shape:
        return TensorChange(key, "shape", before, after)
    if same_bytes(first, second):
        return None
    return TensorChange(key, "values", before, after, _relative_change(first, second))


def _relative_change(first: Tensor, second: Tensor) -> float:
    wide = torch.complex128 if first.is_complex() else torch.float64
    before, after = first.to(wide), second.to(wide)
    # Equal values, such as two zeros, differ by nothing, although 0 / 0 is NaN.
    ratio = torch.where(before == after, 0.0, (after - before).abs() / before.abs())
    return float(ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _is_allowed(change: TensorChange, expect: Expectation, keys: Collection[str]) -> bool:
    if change.what != "values":
        return False
    if expect == "init":
        return change.key in keys
    return change.key.rpartition(".")[2] in _MAY_CHANGE[expect]


def _sentence(change: TensorChange) -> str:
    if change.what == "values":
        return f"{change.key}: values differ by up to {change.relative:.3g} relative"
    difference = f"{change.before} in the first, {change.after} in the second"
    return f"{change.key}: {change.what} differs: {difference}"
