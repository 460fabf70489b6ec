"""The architectures that a state dict resembles, where none fits, and what differs."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify.architecture_index import IndexEntry, SketchMatch, load_shipped_index
from ckpt_tools.identify.key_matching import compare_shapes
from ckpt_tools.identify.recipe import recipe_without_arguments
from ckpt_tools.identify.shape_digest import Shape, Shapes
from ckpt_tools.identify.skeleton import build_skeleton, state_dict_shapes

_SHORTLIST = 8  # architectures that are built to see what really differs
_LIKELY = 0.2  # of a sketch: what chance gives once in a hundred models
_QUANTISABLE = "quantized_"  # torchvision's second name for a model of the same tensors
_SIZES = "the class count or the input channels"
_RESEMBLES = 0.1  # share of common tensors below which a name would only mislead


@dataclass(frozen=True)
class SimilarArchitecture:
    """``fitting`` of the architecture's ``total`` tensors are there; ``share`` is that of all tensors of both."""

    architecture: str
    fitting: int
    total: int
    share: float
    difference: str

    def __str__(self) -> str:
        return f"{self.architecture} ({self.fitting} of {self.total} tensors fit; first difference {self.difference})"


def find_closest_architectures(shapes: Shapes, count: int = 3) -> list[SimilarArchitecture]:
    """The most similar architectures by exact comparison of a shortlist, the closest first.

    Neither the class count nor the input channels make a difference.
    """
    likely = [near for near in load_shipped_index().nearest_entries(shapes, _SHORTLIST) if near.likeness >= _LIKELY]
    found = [close for near in likely if (close := _compare_entry(shapes, near)) is not None]
    found = [close for close in found if close.architecture.replace(_QUANTISABLE, "") not in _names(found, close)]
    found.sort(key=lambda close: -close.share)
    return [close for close in found[:count] if close.share >= _RESEMBLES]


def describe_closest(shapes: Shapes) -> str:
    """For a message: the closest three and what differs, or that nothing resembles the tensors."""
    found = find_closest_architectures(shapes)
    if not found:
        libraries = " or ".join(f"{name} {version}" for name, version in load_shipped_index().versions.items())
        return f"No architecture of {libraries} resembles it."
    return "Closest by its tensors:\n  " + "\n  ".join(map(str, found))


def _compare_entry(shapes: Shapes, near: SketchMatch) -> SimilarArchitecture | None:
    try:
        adapter, recipe = recipe_without_arguments(near.entry.architecture)
        wanted = state_dict_shapes(build_skeleton(adapter, recipe.name, {}))
    except ArchitectureError:  # the library's version has it no more
        return None
    inner = {key.removeprefix(near.prefix): s for key, s in shapes.items() if key.startswith(near.prefix)}
    outer = tuple(key for key in shapes if not key.startswith(near.prefix))
    present = _ignore_size_differences(inner, wanted, near.entry)
    found = compare_shapes(wanted, present)
    fitting = len(wanted) - len(found.reshaped) - len(found.missing)
    share = fitting / max(1, len(wanted) + len(found.unexpected) + len(outer))
    difference = _first(found.keys, wanted, present) or (f"{outer[0]}: only in the checkpoint" if outer else _SIZES)
    return SimilarArchitecture(near.entry.architecture, fitting, len(wanted), share, difference)


def _ignore_size_differences(shapes: Shapes, wanted: Shapes, entry: IndexEntry) -> dict[str, tuple[int, ...]]:
    """The shapes with the architecture's own class count and input channels, so that these count for nothing."""
    free = {*entry.head, *entry.stem}
    return {
        key: wanted[key] if key in free and key in wanted and _alike(wanted[key], shape) else shape
        for key, shape in shapes.items()
    }


def _alike(one: Shape, other: Shape) -> bool:
    """Whether they differ along one axis at most: another kernel size is another architecture."""
    return len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) <= 1


def _names(found: list[SimilarArchitecture], without: SimilarArchitecture) -> set[str]:
    return {close.architecture for close in found if close is not without}


def _first(keys: tuple[str, ...], wanted: Shapes, present: Shapes) -> str:
    """The first difference in the order of the architecture's keys."""
    order = {key: i for i, key in enumerate([*wanted, *present])}
    key = min(keys, key=lambda one: order[one], default="")
    if key in wanted and key in present:
        return f"{key}: {wanted[key]} there, {present[key]} in the checkpoint"
    if key in wanted:
        return f"{key}: the checkpoint lacks it"
    return f"{key}: only in the checkpoint" if key else ""
