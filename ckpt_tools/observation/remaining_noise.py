"""Noise under test conditions: operations that draw random numbers whatever the mode of the model."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_tools.model.randomness import TorchRandomness
from ckpt_tools.results import DropoutSite
from ckpt_tools.walker.dropout_sites import draws_random_numbers, is_custom_operator, masking_drop_rate

# What a random operation calls its switch, and the value at which nothing is random.
_SWITCHES = {"train": False, "training": False, "dropout_p": 0.0}
_DIVISIONS, _PRODUCTS = ("aten::div", "aten::div_"), ("aten::mul", "aten::mul_")
_TOLERANCE = 1e-6  # of a factor that should be the inverse of a keep probability


class NoiseRemoval(TorchDispatchMode):
    """Switches noise off that does not ask for the mode, and notes the noise that it cannot switch off.

    Two kinds are switched off, wherever they come from (Python, traced graphs, TorchScript):

    - Operations with an argument for it, such as ``native_dropout`` and ``rrelu_with_noise``.
    - A Bernoulli mask that is divided by its keep probability becomes ones. This is inverted
      dropout as ``aten::dropout`` and stochastic depth compute it.

    Any other random numbers may mean anything, so they stay, and are in ``noise_left_on``.

    One forward shows which noise there is. If that is none, or none that can be switched off,
    ``is_needed`` is False afterwards: without the mode, later forwards are faster.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_needed = True
        self.noise_left_on: tuple[DropoutSite, ...] = ()
        self.module_names: Mapping[int, str] = {}
        self._has_switched_off = False
        self._sites: dict[str, DropoutSite] = {}
        # Keep probability and site of the masks of this forward, until they are divided by it.
        self._masks: dict[StorageWeakRef, tuple[float, str]] = {}

    def __enter__(self) -> NoiseRemoval:
        self._sites, self._masks = {}, {}
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        # A forward that broke off, for want of memory say, has not shown everything.
        if error[0] is None and self.is_needed:
            known = {site.name: site for site in self.noise_left_on}
            self.noise_left_on = tuple((known | self._sites).values())
            self.is_needed = self._has_switched_off

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            return func(*args, **kwargs)
        if is_custom_operator(func):
            randomness = TorchRandomness()
            output = func(*args, **kwargs)
            if randomness.has_advanced():
                self._add_site(func, None)
            return output
        if not draws_random_numbers(func, args, kwargs):
            output = func(*args, **kwargs)
            return self._complete_mask(func, args, output)
        quiet_args, quiet_kwargs = _switch_off(func, args, kwargs)
        if not draws_random_numbers(func, quiet_args, quiet_kwargs):
            self._has_switched_off = True
            return func(*quiet_args, **quiet_kwargs)
        output = func(*args, **kwargs)
        drop_rate = masking_drop_rate(func, args, kwargs)
        name = self._add_site(func, drop_rate)
        if drop_rate is not None and _is_dense(output):
            self._masks[StorageWeakRef(output.untyped_storage())] = (1 - drop_rate, name)
        return output

    def _complete_mask(self, func: OpOverload, args: Sequence[object], output: object) -> object:
        """Fill the result with ones if the operation divides a mask by its keep probability."""
        if not self._masks or func._schema.name not in (*_DIVISIONS, *_PRODUCTS):
            return output
        mask, factor = args[0], args[1]
        if not isinstance(factor, (int, float)) or not _is_dense(mask) or not _is_dense(output):
            return output
        keep, name = self._masks.get(StorageWeakRef(mask.untyped_storage()), (0.0, ""))
        scale = keep / factor if func._schema.name in _DIVISIONS and factor else keep * factor
        if abs(scale - 1) > _TOLERANCE:
            return output
        self._has_switched_off = True
        self._sites.pop(name, None)
        return output.fill_(1)

    def _add_site(self, func: OpOverload, rate: float | None) -> str:
        name = module = self._name_of_running_module() or "(root)"
        # The second site of a module is called NAME:2, as in a walk.
        for number in itertools.count(2):
            if name not in self._sites:
                break
            name = f"{module}:{number}"
        self._sites[name] = DropoutSite(name, func._schema.name.replace("::", "."), rate)
        return name

    def _name_of_running_module(self) -> str:
        """The name of the innermost running module that the model knows by one."""
        # Noise is rare. Hooks on every module, which would tell the same, cost every forward, and
        # torch.compile warns of them.
        frame = inspect.currentframe()
        while frame is not None:
            name = self.module_names.get(id(frame.f_locals.get("self")))
            if name is not None:
                return name
            frame = frame.f_back
        return ""


def _is_dense(value: object) -> TypeGuard[Tensor]:
    """Tell whether a value is a tensor with a storage, as sparse and nested ones are not."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def _switch_off(
    func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments of an operation with its switch for random numbers off, if it has one."""
    positional, by_name = list(args), dict(kwargs)
    for position, argument in enumerate(func._schema.arguments):
        if argument.name not in _SWITCHES:
            continue
        if position < len(positional):
            positional[position] = _SWITCHES[argument.name]
        else:
            by_name[argument.name] = _SWITCHES[argument.name]
    return tuple(positional), by_name
