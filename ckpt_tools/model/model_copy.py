"""A copy of a model, to be run in any mode.

Training mode may write to anything that a model holds; what the copy's forward writes, the model
never sees.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_tools.model.rebinding import rebind_functions

# "leaves": training mode for modules without children alone. ``record_forward`` says why.
RecordingMode = Literal["training", "leaves", "evaluation"]


def copy_model(model: nn.Module, *, meta: bool) -> nn.Module:
    """Return a copy of the model for one forward, on meta tensors or with copies of all contents.

    Parameters, buffers and the tensors among the attributes of modules are copied, so that the
    copy's forward may write to them. Attributes that cannot be copied, such as locks and open
    files, are shared. Parameters of the copy require no gradients.
    """

    def copy_tensor(tensor: Tensor) -> Tensor:
        return tensor.detach().to("meta") if meta else tensor.detach().clone()

    # deepcopy takes from its memo what stands there, and so uses these copies of tensors.
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(copy_tensor(parameter), requires_grad=False)
    for module in model.modules():
        attributes = [value for value in vars(module).values() if isinstance(value, Tensor)]
        for tensor in [*module._buffers.values(), *attributes]:
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = copy_tensor(tensor)
    copies = dict(memo)
    try:
        twin = copy.deepcopy(model, copies)
    except Exception:  # noqa: BLE001 - a lock or an open file among the attributes
        copies = memo  # a copying that failed has left parts of a copy in the other
        twin = _copy_by_attribute(model, copies)
    # A wrapped forward or a hook would otherwise still run the original.
    rebind_functions(twin, copies)
    return twin


def _copy_by_attribute(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy each module attribute by attribute, and share the attributes that cannot be copied."""
    modules = list(model.modules())
    # All modules first: an attribute may refer to any of them.
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    for module in modules:
        attributes = {}
        for name, value in vars(module).items():
            try:
                attributes[name] = copy.deepcopy(value, memo)
            except Exception:  # noqa: BLE001 - whatever its copying raises
                attributes[name] = value
        memo[id(module)].__dict__.update(attributes)
    twin: nn.Module = memo[id(model)]
    return twin


def set_mode(model: nn.Module, mode: RecordingMode) -> dict[int, str]:
    """Set the ``training`` flag of every module of a copy, and return the names of BN layers.

    In the training modes it is the model's own ``train()`` that decides, because what that keeps in
    evaluation mode, such as a frozen backbone with its dropout, never ran in training mode. Where
    it fails or sets nothing, every module is set. BN layers are always in evaluation mode. Their
    names stand under the ``id`` of their ``running_var``, by which the layer of a call of
    ``F.batch_norm`` can be recognised.
    """
    layers: dict[int, str] = {}
    all_modules = mode != "evaluation" and not _call_own_train(model)
    for name, module in model.named_modules():
        trains = mode != "evaluation" and (all_modules or module.training)
        module.training = trains and (mode == "training" or not module._modules)
        if isinstance(module, _BatchNorm):
            # Not with .eval(): BN layers of timm hold drop and activation modules.
            module.training = False
            layers.setdefault(id(module.running_var), name)
    return layers


def _call_own_train(model: nn.Module) -> bool:
    """Call the model's own ``train()``; False if it fails, or sets no module to training mode."""
    for module in model.modules():
        module.training = False
    try:
        model.train()
    except Exception:  # noqa: BLE001 - somebody else's train() may do anything
        return False
    return any(module.training for module in model.modules())
