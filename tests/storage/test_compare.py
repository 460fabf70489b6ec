"""Comparing: bits decide, differences are named, and an expectation lists what violates it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.compare import TensorChange, compare_checkpoints, compare_files, same_bytes
from ckpt_tools.storage.output.checkpoint_writer import write_safetensors
from ckpt_tools.storage.provenance import checkpoint_provenance, output_metadata

STATE = {
    "conv.weight": torch.arange(6.0).view(2, 3),
    "bn.running_mean": torch.tensor([1.0, 2.0]),
    "bn.running_var": torch.tensor([1.0, 4.0]),
    "bn.num_batches_tracked": torch.tensor(7),
}


def checkpoint(tensors: dict[str, Tensor], **metadata: str) -> Checkpoint:
    return Checkpoint(Path("x"), "safetensors", tensors, metadata=metadata)


def against(**changed: Tensor) -> dict[str, Tensor]:
    return {key: changed.get(key.replace(".", "_"), tensor.clone()) for key, tensor in STATE.items()}


def test_identical() -> None:
    found = compare_checkpoints(checkpoint(STATE), checkpoint(against()))
    assert (found.changes, found.only_before, found.only_after, found.identical) == ((), (), (), 4)
    assert found.same_order
    assert found.unexpected_differences("nothing") == ()


def test_each_kind_of_difference() -> None:
    other = against(
        conv_weight=torch.zeros(3, 2),
        bn_running_mean=STATE["bn.running_mean"].half(),
        bn_running_var=torch.tensor([1.0, 5.0]),
    )
    del other["bn.num_batches_tracked"]
    found = compare_checkpoints(checkpoint(STATE), checkpoint({**other, "new": torch.ones(1)}))
    assert found.only_before == ("bn.num_batches_tracked",)
    assert found.only_after == ("new",)
    assert found.identical == 0
    assert found.changes == (
        TensorChange("conv.weight", "shape", "float32 (2, 3)", "float32 (3, 2)"),
        TensorChange("bn.running_mean", "dtype", "float32 (2,)", "float16 (2,)"),
        TensorChange("bn.running_var", "values", "float32 (2,)", "float32 (2,)", 0.25),
    )
    assert len(found.unexpected_differences("variance")) == 4
    assert found.unexpected_differences("any") == ()


@pytest.mark.parametrize(
    ("changed", "allowed"),
    [
        ({"bn_running_var": torch.tensor([1.0, 5.0])}, {"variance", "mean+variance", "any"}),
        ({"bn_running_mean": torch.tensor([1.0, 5.0])}, {"mean+variance", "any"}),
        ({"bn_num_batches_tracked": torch.tensor(8)}, {"any"}),
        ({"bn_running_var": torch.tensor([1.0, 4.0, 5.0])}, {"any"}),
    ],
)
def test_expectations(changed: dict[str, Tensor], allowed: set[str]) -> None:
    found = compare_checkpoints(checkpoint(STATE), checkpoint(against(**changed)))
    for expect in ("nothing", "variance", "mean+variance", "any"):
        violations = found.unexpected_differences(expect)
        assert (violations == ()) == (expect in allowed)
        assert all(next(iter(changed)).partition("_")[2] in line for line in violations)


def test_an_initialisation_may_change_the_keys_it_names() -> None:
    found = compare_checkpoints(checkpoint(STATE), checkpoint(against(conv_weight=torch.ones(2, 3))))
    assert found.unexpected_differences("init", {"conv.weight"}) == ()
    assert len(found.unexpected_differences("init", {"bn.running_var"})) == 1
    assert len(found.unexpected_differences("init")) == 1
    for other in (torch.ones(3, 2), torch.ones(2, 3).half()):
        reshaped = compare_checkpoints(checkpoint(STATE), checkpoint(against(conv_weight=other)))
        assert len(reshaped.unexpected_differences("init", {"conv.weight"})) == 1


def test_a_file_says_itself_what_may_differ(tmp_path: Path) -> None:
    def words(**said: object) -> str:
        path = tmp_path / "after.safetensors"
        metadata = output_metadata(None, said)
        write_safetensors(path, against(), metadata=metadata, overwrite=True)
        return compare_files(path, path)[1]

    assert words() == "variance"
    assert words(statistics="mean+variance") == "mean+variance"
    assert words(statistics=["variance"]) == "variance"
    assert words(expect="init", rewritten=["conv.weight"], zeroed=[]) == "init"
    with pytest.raises(CheckpointError, match="no such list"):
        words(expect="init", rewritten=3, zeroed=[])


def test_another_order_of_keys() -> None:
    found = compare_checkpoints(checkpoint(STATE), checkpoint(dict(reversed(STATE.items()))))
    assert not found.same_order
    assert found.unexpected_differences("variance") == ("the keys stand in another order",)


def test_relative_change_at_zero_infinity_and_nan() -> None:
    def change(before: list[float], after: list[float]) -> float | None:
        return (
            compare_checkpoints(*(checkpoint({"a": torch.tensor(x)}) for x in (before, after)))
            .changes[0]
            .relative
        )

    assert change([2.0, math.inf], [1.0, math.inf]) == 0.5
    assert change([0.0], [1e-9]) == math.inf
    assert change([1.0], [math.nan]) == math.inf
    assert change([0.0], [-0.0]) == 0.0


@given(st.binary(min_size=8, max_size=8), st.integers(0, 63))
def test_one_flipped_bit_is_seen_and_equal_nans_are_equal(content: bytes, bit: int) -> None:
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64):
        one, same, other = (torch.frombuffer(bytearray(x), dtype=dtype) for x in (content, content, flipped))
        assert same_bytes(one, same)
        assert not same_bytes(one, other)


def test_strides_do_not_matter() -> None:
    x = torch.randn(3, 4)
    assert same_bytes(x.t(), x.t().contiguous())
    assert not same_bytes(x, x.t())


def test_provenance_of_other_files() -> None:
    assert checkpoint_provenance(checkpoint(STATE)) is None
    for text in ("", "{", "[1]", "null"):
        assert checkpoint_provenance(checkpoint(STATE, ckpt_tools=text)) is None
    assert checkpoint_provenance(checkpoint(STATE, ckpt_tools='{"images": 3}')) == {"images": 3}
