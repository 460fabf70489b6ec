"""Comparing two checkpoints bit by bit: which keys differ, in what, and by how much."""

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

__all__ = ["Comparison", "Expectation", "TensorChange", "compare_checkpoints", "compare_files", "same_bytes"]

Expectation = Literal["nothing", "variance", "mean+variance", "init", "any"]

_MAY_CHANGE: Mapping[str, tuple[str, ...]] = {
    "nothing": (),
    "variance": ("running_var",),
    "mean+variance": ("running_var", "running_mean"),
}


@dataclass(frozen=True)
class TensorChange:
    """One tensor that differs. ``before`` and ``after`` describe its type and shape.

    ``relative`` is the largest |after − before| / |before| over its elements, infinite where ``before`` is 0 or
    a value became NaN; None if types or shapes differ.
    """

    key: str
    what: Literal["dtype", "shape", "values"]
    before: str
    after: str
    relative: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All differences between two checkpoints. Equal means equal bytes, so a NaN equals the same NaN."""

    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    changes: tuple[TensorChange, ...]
    identical: int
    same_order: bool  # of the keys that both have

    def unexpected_differences(self, expect: Expectation, keys: Collection[str] = ()) -> tuple[str, ...]:
        """One sentence for each difference that ``expect`` does not allow; empty if all is as expected.

        "variance" allows new values of ``running_var``, "mean+variance" those of ``running_mean`` too, "init" those
        of ``keys``.
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
    found = [_change(key, before.tensors[key], after.tensors[key]) for key in common]
    changes = tuple(change for change in found if change is not None)
    return Comparison(
        only_before=tuple(key for key in before.tensors if key not in after.tensors),
        only_after=tuple(key for key in after.tensors if key not in before.tensors),
        changes=changes,
        identical=len(common) - len(changes),
        same_order=common == [key for key in after.tensors if key in before.tensors],
    )


def compare_files(
    before: LocationLike, after: LocationLike, expect: str = "auto", *, weights: str = "auto", trust: bool = False
) -> tuple[Comparison, Expectation, tuple[str, ...]]:
    """Compare two files; what was expected to differ; and what else does, a sentence each.

    Where ``after`` is an output of this tool, it says itself which weights of its source it was made from and what
    may differ ("auto"). "init" allows new values of the weights that an initialised file lists as rewritten, and zeros
    in the biases that it lists as zeroed. Raises CheckpointError.
    """
    new = read_checkpoint(after, trust=trust)
    said = checkpoint_provenance(new) or {}
    expectation = _read_expectation(said) if expect == "auto" else cast("Expectation", expect)
    rewritten, zeroed = _listed_keys(said, after) if expectation == "init" else ((), ())
    comparison = compare_checkpoints(_source_of(before, said, weights, trust), new)
    unfounded = _describe_wrong_entries(new.tensors, rewritten, zeroed)
    return comparison, expectation, (*unfounded, *comparison.unexpected_differences(expectation, {*rewritten, *zeroed}))


def _read_expectation(said: Mapping[str, object]) -> Expectation:
    """What may differ from its source in a file that says this of itself."""
    if said.get("expect") in ("init", "nothing"):
        return cast("Expectation", said["expect"])
    statistics = str(said.get("statistics"))
    return cast("Expectation", statistics) if statistics in _MAY_CHANGE else "variance"


def _listed_keys(said: Mapping[str, object], path: LocationLike) -> tuple[list[str], list[str]]:
    """The keys of the new weights and of the biases set to zero."""
    rewritten, zeroed = said.get("rewritten"), said.get("zeroed")
    if said.get("expect") != "init" or not isinstance(rewritten, list) or not isinstance(zeroed, list):
        raise CheckpointError(
            f"{path}: expected an output of init-rewrite, which lists the weights it rewrote, found no such list. "
            "Compare with --expect auto, or with --expect any to see what differs."
        )
    return [str(key) for key in rewritten], [str(key) for key in zeroed]


def _describe_wrong_entries(
    tensors: Mapping[str, Tensor], rewritten: Collection[str], zeroed: Collection[str]
) -> tuple[str, ...]:
    """One sentence for each entry of the lists that is not what an initialisation makes."""
    vectors = [key for key in rewritten if key in tensors and tensors[key].ndim < 2]
    filled = [key for key in zeroed if key in tensors and bool(tensors[key].any())]
    return (
        *(f"{key}: listed as a rewritten weight, but has fewer than two dimensions" for key in vectors),
        *(f"{key}: listed as a bias set to zero, but holds other values" for key in filled),
    )


def _source_of(path: LocationLike, said: Mapping[str, object], weights: str, trust: bool) -> Checkpoint:
    if weights == "auto" and "weights" in said:
        try:
            return reread_checkpoint(
                path, weights=str(said["weights"]), prefix=str(said.get("prefix", "")), trust=trust
            )
        except CheckpointError:
            pass  # not the source that ``after`` speaks of
    return read_checkpoint(path, weights=weights, trust=trust)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits."""
    return one.dtype == other.dtype and one.shape == other.shape and equal_bytes(raw_bytes(one), raw_bytes(other))


def _change(key: str, one: Tensor, other: Tensor) -> TensorChange | None:
    before, after = _describe(one), _describe(other)
    if one.dtype != other.dtype:
        return TensorChange(key, "dtype", before, after)
    if one.shape != other.shape:
        return TensorChange(key, "shape", before, after)
    if same_bytes(one, other):
        return None
    return TensorChange(key, "values", before, after, _relative(one, other))


def _relative(one: Tensor, other: Tensor) -> float:
    wide = torch.complex128 if one.is_complex() else torch.float64
    before, after = one.to(wide), other.to(wide)
    ratio = torch.where(before == after, 0.0, (after - before).abs() / before.abs())
    return float(ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _is_allowed(change: TensorChange, expect: Expectation, keys: Collection[str]) -> bool:
    if change.what != "values":
        return False
    return change.key in keys if expect == "init" else change.key.rpartition(".")[2] in _MAY_CHANGE[expect]


def _sentence(change: TensorChange) -> str:
    if change.what == "values":
        return f"{change.key}: values differ by up to {change.relative:.3g} relative"
    return f"{change.key}: {change.what} differs: {change.before} in the first, {change.after} in the second"
