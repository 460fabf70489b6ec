"""The checks that every adapter must pass, and the cases that they run on.

A check states with a message what it expected, since pytest rewrites the bare assertions of test
files only, not those of an installed package.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn

from ckpt_tools.contract import Adapter, InputSpec, Recipe
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.file_arguments import Evidence, NotAdmitted, admit_argument

__all__ = ["CHECKS", "Case", "Check", "parametrize_checks"]

_Test = TypeVar("_Test", bound=Callable[..., Any])
_Shapes = dict[str, tuple[int, ...]]
# Strings that would open a file, import a class or start a download, and a size without bound.
_HARMFUL_VALUES = ("/etc/passwd", "package.module:Class", "hf-hub:someone/net", ["a.pt"], 10**12)


@dataclass(frozen=True)
class Case:
    """One architecture that an adapter builds quickly.

    `kwargs` are passed to the constructor throughout. `resized` are other sizes (a number of
    classes or input channels) that the adapter must recognise from the shapes of a state dict; use
    {} where the architecture has no such argument.
    """

    adapter: Callable[[], Adapter]
    name: str
    kwargs: Mapping[str, object] = field(default_factory=dict)
    resized: Mapping[str, object] = field(default_factory=lambda: {"num_classes": 3})

    def __str__(self) -> str:
        return f"{self.adapter().prefix}:{self.name}"


Check = Callable[[Case], None]


def parametrize_checks(*cases: Case) -> Callable[[_Test], _Test]:
    """Return a decorator that runs a pytest test of (check, case) for every check and case."""
    import pytest  # only here: nobody else who has ckpt_tools needs it

    def decorate(test: _Test) -> _Test:
        for_cases = pytest.mark.parametrize("case", cases, ids=str)
        for_checks = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
        parametrized: _Test = for_checks(for_cases(test))
        return parametrized

    return decorate


def check_protocol(case: Case) -> None:
    """The adapter has all methods, a prefix that is an identifier, and sorted names."""
    adapter = case.adapter()
    assert isinstance(adapter, Adapter), f"{adapter!r} lacks a method of ckpt_tools.contract.Adapter"
    assert adapter.prefix.isidentifier(), f"prefix {adapter.prefix!r}: expected an identifier"
    names = list(adapter.architectures())
    assert names == sorted(set(names)), "architectures(): expected sorted names without repetition"
    assert not names or case.name in names, f"architectures() does not list {case.name}"


def check_builds_a_new_module_offline(case: Case) -> None:
    """Two built models share nothing; building needs no network and changes no defaults."""
    with _no_network(), _unchanged_defaults():
        first, second = (case.adapter().build(case.name, case.kwargs) for _ in range(2))
    assert isinstance(first, nn.Module), f"build() returned {type(first).__name__}, not a module"
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert not shared, "two models that build() returned share parameters"
    assert first.state_dict().keys() == second.state_dict().keys(), "two models have different keys"


def check_unknown_names_and_arguments_are_named(case: Case) -> None:
    """An unknown architecture or argument raises ArchitectureError with its name in the message."""
    adapter = case.adapter()
    _expect_architecture_error(adapter, case.name + "_no_such_thing", {}, "no_such_thing")
    arguments = {**case.kwargs, "no_such_argument": 1}
    _expect_architecture_error(adapter, case.name, arguments, "no_such_argument")


def check_sizes_follow_from_shapes(case: Case) -> None:
    """`class_kwargs` finds the arguments that rebuild the shapes of a state dict."""
    adapter = case.adapter()
    for sizes in ({}, case.resized):
        shapes = _build_shapes(case, sizes)
        arguments = adapter.class_kwargs(shapes, case.name, case.kwargs)
        assert arguments.items() >= sizes.items(), f"class_kwargs(): expected {sizes}, found {arguments}"
        assert _build_shapes(case, arguments) == shapes, f"{arguments} do not rebuild the shapes"


def check_strange_shapes_do_not_confuse(case: Case) -> None:
    """A state dict of another model makes `class_kwargs` raise nothing."""
    arguments = case.adapter().class_kwargs({"weight": (), "fc": (3,)}, case.name, case.kwargs)
    assert all(isinstance(key, str) for key in arguments), f"expected names, found {arguments}"


def check_rates_are_taken_and_keep_the_keys(case: Case) -> None:
    """The constructor takes every listed drop rate, and no rate changes a tensor."""
    rates = dict.fromkeys(case.adapter().rate_kwargs(case.name), 0.2)
    assert _build_shapes(case, rates) == _build_shapes(case, {}), f"{rates} change the state dict"


def check_words_give_its_own_recipe_or_none(case: Case) -> None:
    """The adapter recognises what its library recorded, and nothing in meaningless records."""
    adapter = case.adapter()
    for words in ({}, {"arch": 7, "args": "?"}, {"arch": "no_such_thing", "args": {"model": None}}):
        recipe = adapter.recognise(words)
        assert recipe is None, f"recognise({words}): expected None, found {recipe}"
    recipe = adapter.recognise({"arch": f"{adapter.prefix}:{case.name}", "epoch": 3})
    if recipe is not None:
        assert isinstance(recipe, Recipe), f"expected a Recipe, found {type(recipe).__name__}"
        architecture = (recipe.adapter, recipe.name)
        assert architecture == (adapter.prefix, case.name), f"recognised as {architecture}"
        assert recipe.rates == "unknown", f"no rate was recorded, yet rates are {recipe.rates!r}"


def check_the_input_fits_the_model(case: Case) -> None:
    """The model runs on an input of the named shape, and the preprocessing is consistent."""
    adapter = case.adapter()
    with torch.device("meta"):
        model = adapter.build(case.name, case.kwargs).eval()
        spec = adapter.input_spec(model, case.name, {})
        if spec is None:
            return
        model(torch.zeros(2, *spec.shape))
    assert isinstance(spec, InputSpec), f"expected an InputSpec, found {type(spec).__name__}"
    assert len(spec.mean) == len(spec.std), f"mean {spec.mean} and std {spec.std} differ in length"
    assert len(spec.mean) in (0, spec.shape[0]), f"{spec.mean} for {spec.shape[0]} channels"
    assert 0 < spec.crop_pct <= 1, f"crop_pct: expected more than 0 and at most 1, found {spec.crop_pct}"
    assert spec.origin, "origin is empty: it says where the preprocessing comes from"


def check_a_file_cannot_name_anything_in_an_argument(case: Case) -> None:
    """No argument that a file may set admits a path, a class, a repository or an unbounded size."""
    list_kinds = getattr(case.adapter(), "file_arguments", None)
    if list_kinds is None:  # then a file sets drop rates alone
        return
    evidence = Evidence(tensors=100, largest_dimension=1000)
    for name, kind in list_kinds(case.name).items():
        for value in _HARMFUL_VALUES:
            try:
                admit_argument({name: kind}, name, value, evidence)
            except NotAdmitted:
                continue
            raise AssertionError(f"file_arguments(): {name} admits {value!r} from a file")


CHECKS: tuple[Check, ...] = (
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


def _expect_architecture_error(
    adapter: Adapter, name: str, kwargs: Mapping[str, object], mentioned: str
) -> None:
    message = None
    try:
        adapter.build(name, kwargs)
    except ArchitectureError as error:
        message = str(error)
    assert message is not None, f"build({name!r}, {kwargs}): expected ArchitectureError, it built"
    assert mentioned in message, f"the message of ArchitectureError does not name {mentioned}: {message}"


def _build_shapes(case: Case, arguments: Mapping[str, object]) -> _Shapes:
    kwargs = {**case.kwargs, **arguments}
    try:
        with torch.device("meta"):
            model = case.adapter().build(case.name, kwargs)
    except ArchitectureError:  # some constructors compute with values, which meta tensors lack
        model = case.adapter().build(case.name, kwargs)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@contextmanager
def _no_network() -> Iterator[None]:
    with mock.patch.object(socket.socket, "connect", side_effect=AssertionError("a download")):
        yield


@contextmanager
def _unchanged_defaults() -> Iterator[None]:
    before = _read_defaults()
    yield
    assert _read_defaults() == before, f"build() changed torch's defaults from {before}"


def _read_defaults() -> tuple[torch.dtype, torch.device, bool]:
    return torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
