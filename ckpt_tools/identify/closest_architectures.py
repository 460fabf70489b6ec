"""The architectures that a state dict resembles most, for the message that none fits it."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify.architecture_index import IndexEntry, SketchMatch, load_shipped_index
from ckpt_tools.identify.key_matching import compare_shapes
from ckpt_tools.identify.recipe import recipe_without_arguments
from ckpt_tools.identify.shape_digest import Shape, Shapes
from ckpt_tools.identify.skeleton import build_skeleton, state_dict_shapes

_SHORTLIST = 8  # Building an architecture takes time, so only so many are compared exactly.
_MIN_LIKENESS = 0.2  # Of a sketch. One unrelated model in a hundred reaches it by chance.
_MIN_SHARE = 0.1  # With fewer tensors in common, naming the architecture would mislead.
_QUANTISABLE = "quantized_"  # torchvision has a quantisable twin, with the same tensors, of some models.
_SIZES = "the class count or the input channels"


@dataclass(frozen=True)
class SimilarArchitecture:
    """How much of an architecture a state dict holds, and the first difference.

    `fitting` of the architecture's `total` tensors stand in the state dict with the same shape.
    `share` is `fitting` divided by the number of all tensors of both.
    """

    architecture: str
    fitting: int
    total: int
    share: float
    difference: str

    def __str__(self) -> str:
        return (
            f"{self.architecture} ({self.fitting} of {self.total} tensors fit; first difference "
            f"{self.difference})"
        )


def find_closest_architectures(shapes: Shapes, count: int = 3) -> list[SimilarArchitecture]:
    """Return the most similar architectures, the closest first.

    Sketches choose a shortlist, which is compared tensor by tensor. Another class count or another
    number of input channels does not count as a difference. A quantisable twin is left out where
    its plain model is in the list.
    """
    similar: dict[str, SimilarArchitecture] = {}
    for match in load_shipped_index().nearest_entries(shapes, _SHORTLIST):
        if match.likeness >= _MIN_LIKENESS and (comparison := _compare_entry(shapes, match)):
            similar[comparison.architecture] = comparison
    distinct = [
        comparison
        for architecture, comparison in similar.items()
        if _QUANTISABLE not in architecture or architecture.replace(_QUANTISABLE, "") not in similar
    ]
    distinct.sort(key=lambda comparison: -comparison.share)
    return [comparison for comparison in distinct[:count] if comparison.share >= _MIN_SHARE]


def describe_closest(shapes: Shapes) -> str:
    """Describe for a message the three closest architectures and their first differences.

    Says so where no architecture resembles the tensors.
    """
    similar = find_closest_architectures(shapes)
    if not similar:
        versions = load_shipped_index().versions
        libraries = " or ".join(f"{name} {version}" for name, version in versions.items())
        return f"No architecture of {libraries} resembles it."
    return "Closest by its tensors:\n  " + "\n  ".join(map(str, similar))


def _compare_entry(shapes: Shapes, match: SketchMatch) -> SimilarArchitecture | None:
    """Build the architecture and compare it; None if the installed library no longer has it."""
    prefix, entry = match.prefix, match.entry
    try:
        adapter, recipe = recipe_without_arguments(entry.architecture)
        expected = state_dict_shapes(build_skeleton(adapter, recipe.name, {}))
    except ArchitectureError:
        return None
    inner = {key.removeprefix(prefix): s for key, s in shapes.items() if key.startswith(prefix)}
    outer = [key for key in shapes if not key.startswith(prefix)]
    present = _ignore_size_differences(inner, expected, entry)
    differences = compare_shapes(expected, present)
    # Counters may be absent, which is no difference, but what is absent does not fit, either.
    fitting = sum(present.get(key) == shape for key, shape in expected.items())
    share = fitting / max(1, len(expected) + len(differences.unexpected) + len(outer))
    if differences.keys:
        description = _describe_first_difference(differences.keys, expected, present)
    else:
        description = f"{outer[0]}: only in the checkpoint" if outer else _SIZES
    return SimilarArchitecture(entry.architecture, fitting, len(expected), share, description)


def _ignore_size_differences(shapes: Shapes, expected: Shapes, entry: IndexEntry) -> Shapes:
    """Return the shapes with the architecture's own class count and number of input channels."""
    adjusted = dict(shapes)
    for key in {*entry.head, *entry.stem} & shapes.keys() & expected.keys():
        if _agree_but_for_one_axis(expected[key], shapes[key]):
            adjusted[key] = expected[key]
    return adjusted


def _agree_but_for_one_axis(first: Shape, second: Shape) -> bool:
    # A class count changes one axis. A kernel size changes two, and makes another architecture.
    return len(first) == len(second) and sum(a != b for a, b in zip(first, second, strict=True)) <= 1


def _describe_first_difference(keys: tuple[str, ...], expected: Shapes, present: Shapes) -> str:
    """Describe the difference that comes first in the order of the architecture's keys."""
    order = {key: i for i, key in enumerate([*expected, *present])}
    key = min(keys, key=order.__getitem__)
    if key not in expected:
        return f"{key}: only in the checkpoint"
    if key not in present:
        return f"{key}: the checkpoint lacks it"
    return f"{key}: {expected[key]} there, {present[key]} in the checkpoint"
