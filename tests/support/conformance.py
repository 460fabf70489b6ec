"""What every adapter must do. A third party's adapter runs the same suite:

from conformance import CHECKS, Case

@pytest.mark.parametrize("case", [Case(MyAdapter, "small_model")])
@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check, case):
    check(case)
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from torch import nn

from ckpt_tools.contract import Adapter, InputSpec, Recipe
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.file_arguments import Evidence, NotAdmitted, admit_argument


@dataclass(frozen=True)
class Case:
    """An architecture that the adapter builds quickly. ``resized`` are other sizes that shapes must reveal."""

    adapter: Callable[[], Adapter]
    name: str
    kwargs: Mapping[str, object] = field(default_factory=dict)
    resized: Mapping[str, object] = field(default_factory=lambda: {"num_classes": 3})

    def __str__(self) -> str:
        return f"{self.adapter().prefix}:{self.name}"


def check_protocol(case: Case) -> None:
    adapter = case.adapter()
    assert isinstance(adapter, Adapter)
    assert adapter.prefix.isidentifier()
    names = list(adapter.architectures())
    assert names == sorted(set(names))
    assert not names or case.name in names


def check_builds_a_new_module_offline(case: Case) -> None:
    with _no_network(), _same_defaults():
        one, two = (case.adapter().build(case.name, case.kwargs) for _ in range(2))
    assert isinstance(one, nn.Module)
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}
    assert one.state_dict().keys() == two.state_dict().keys()


def check_unknown_names_and_arguments_are_named(case: Case) -> None:
    adapter = case.adapter()
    with pytest.raises(ArchitectureError, match="no_such_thing"):
        adapter.build(case.name + "_no_such_thing", {})
    with pytest.raises(ArchitectureError, match="no_such_argument"):
        adapter.build(case.name, {**case.kwargs, "no_such_argument": 1})


def check_sizes_follow_from_shapes(case: Case) -> None:
    adapter = case.adapter()
    for sizes in ({}, case.resized):
        shapes = _shapes(case, sizes)
        found = adapter.class_kwargs(shapes, case.name, case.kwargs)
        assert found.items() >= sizes.items()
        assert _shapes(case, found) == shapes


def check_strange_shapes_do_not_confuse(case: Case) -> None:
    found = case.adapter().class_kwargs({"weight": (), "fc": (3,)}, case.name, case.kwargs)
    assert all(isinstance(key, str) for key in found)


def check_rates_are_taken_and_keep_the_keys(case: Case) -> None:
    rates = dict.fromkeys(case.adapter().rate_kwargs(case.name), 0.2)
    assert _shapes(case, rates) == _shapes(case, {})


def check_words_give_its_own_recipe_or_none(case: Case) -> None:
    adapter = case.adapter()
    for words in ({}, {"arch": 7, "args": "?"}, {"arch": "no_such_thing", "args": {"model": None}}):
        assert adapter.recognise(words) is None
    recipe = adapter.recognise({"arch": f"{adapter.prefix}:{case.name}", "epoch": 3})
    if recipe is not None:
        assert (recipe.adapter, recipe.name) == (adapter.prefix, case.name)
        assert isinstance(recipe, Recipe)
        assert recipe.rates == "unknown"


def check_the_input_fits_the_model(case: Case) -> None:
    adapter = case.adapter()
    with torch.device("meta"):
        model = adapter.build(case.name, case.kwargs).eval()
        spec = adapter.input_spec(model, case.name, {})
        if spec is None:
            return
        model(torch.zeros(2, *spec.shape))
    assert isinstance(spec, InputSpec)
    assert len(spec.mean) == len(spec.std)
    assert len(spec.mean) in (0, spec.shape[0])
    assert 0 < spec.crop_pct <= 1
    assert spec.origin


def check_a_file_cannot_name_anything_in_an_argument(case: Case) -> None:
    list_kinds = getattr(case.adapter(), "file_arguments", None)
    if list_kinds is None:  # then a file sets drop rates alone
        return
    evidence = Evidence(tensors=100, largest_dimension=1000)
    for name, kind in list_kinds(case.name).items():
        for value in ("/etc/passwd", "package.module:Class", "hf-hub:someone/net", ["a.pt"], 10**12):
            with pytest.raises(NotAdmitted):
                admit_argument({name: kind}, name, value, evidence)


CHECKS = (
    check_a_file_cannot_name_anything_in_an_argument,
    check_protocol,
    check_builds_a_new_module_offline,
    check_unknown_names_and_arguments_are_named,
    check_sizes_follow_from_shapes,
    check_strange_shapes_do_not_confuse,
    check_rates_are_taken_and_keep_the_keys,
    check_words_give_its_own_recipe_or_none,
    check_the_input_fits_the_model,
)


def _shapes(case: Case, further: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    kwargs = {**case.kwargs, **further}
    try:
        with torch.device("meta"):
            model = case.adapter().build(case.name, kwargs)
    except ArchitectureError:  # some constructors compute with values
        model = case.adapter().build(case.name, kwargs)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@contextmanager
def _no_network() -> Iterator[None]:
    with mock.patch.object(socket.socket, "connect", side_effect=AssertionError("a download")):
        yield


@contextmanager
def _same_defaults() -> Iterator[None]:
    before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    yield
    assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == before
