"""The settings of torch, which are put back after somebody else's code has run.

Some belong to the process, the others to the running thread.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch

from ckpt_tools.errors import ModelError
from ckpt_tools.model.process_context import ProcessContext
from ckpt_tools.model.restoring import run_all_steps


@dataclass(frozen=True)
class TorchSetting:
    """A setting of torch: its name for messages, and functions that read and write its value."""

    name: str
    read: Callable[[], object]
    write: Callable[[Any], object]


@contextmanager
def preserve_torch_settings() -> Iterator[None]:
    """Put torch's settings back as they were at the end of the context.

    That are dtypes, devices, precision, determinism, kernels, autocast and threads. Some settings
    belong to the running thread, the others to the process: see ``ProcessContext`` for models that
    take turns in several threads. What this version of torch does not have is left out.
    """
    with _PROCESS, _preserve(_OF_THE_THREAD):
        yield


@contextmanager
def suspend_autocast() -> Iterator[None]:
    """Compute as outside of a caller's ``torch.autocast``, whose dtype is not the stated precision.

    The copies of weights that autocast keeps are dropped before and after: its own lack the dtype
    of another autocast inside, and those that are made inside lack gradients.
    """
    devices = [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]
    if not devices:
        yield
        return
    with ExitStack() as stack:
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def _preserve(settings: Sequence[TorchSetting]) -> Iterator[None]:
    values = _read(settings)
    try:
        yield
    finally:
        _restore(values)


_PROCESS = ProcessContext(lambda: _preserve(_OF_THE_PROCESS))


SettingValues = Sequence[tuple[TorchSetting, object]]

# The value of a setting that torch refuses to tell. It raises where its old and its new names for
# TF32 contradict each other. The new ones decide how torch computes, and they can still be read.
_UNREADABLE = object()


def _read_value(setting: TorchSetting) -> object:
    try:
        return setting.read()
    # AttributeError: this version of torch does not have the setting.
    except (AttributeError, RuntimeError, Warning):
        return _UNREADABLE


def _read(settings: Sequence[TorchSetting]) -> SettingValues:
    return [(setting, _read_value(setting)) for setting in settings]


def _restore(values: SettingValues) -> None:
    """Write the settings that have changed, in order: one setting of a precision changes others."""
    run_all_steps(partial(_restore_setting, setting, value) for setting, value in values)


def _restore_setting(setting: TorchSetting, value: object) -> None:
    if value is _UNREADABLE or _read_value(setting) == value:
        return
    with warnings.catch_warnings():
        # torch warns of old names for TF32, which the caller has not used.
        warnings.simplefilter("ignore")
        try:
            setting.write(value)
        except RuntimeError as error:  # torch.backends.disable_global_flags() forbids it
            raise ModelError(
                f"torch's {setting.name}: expected to set it back to {value}, but torch refuses: "
                f"{error} Start a new process, and keep the model from changing settings for good."
            ) from error


def _attribute(path: str) -> TorchSetting:
    """Return the setting that is an attribute, such as ``backends.cudnn.benchmark``."""
    *parents, name = path.split(".")

    def owner() -> Any:
        return reduce(getattr, parents, torch)

    def write(value: object) -> None:
        setattr(owner(), name, value)

    return TorchSetting(path, lambda: getattr(owner(), name), write)


def _pair(getter: str, setter: str) -> TorchSetting:
    """Return the setting behind two functions of torch, given by their paths.

    They are looked up late, because this version of torch may not have them.
    """

    def function(path: str) -> Any:
        return reduce(getattr, path.split("."), torch)

    return TorchSetting(getter, lambda: function(getter)(), lambda value: function(setter)(value))


def _pair_of_tuples(
    name: str, getters: Sequence[Callable[[], object]], setter: Callable[..., object]
) -> TorchSetting:
    """Return a setting of several values, which one function sets together."""

    def read() -> object:
        return tuple(getter() for getter in getters)

    return TorchSetting(name, read, lambda values: setter(*values))


def _reductions(dtype: str) -> TorchSetting:
    """Return whether matrix products may add up in ``dtype``."""
    # In newer torch the value is a pair, of which the attribute tells only one.
    name = f"allow_{dtype}_reduced_precision_reduction"
    return TorchSetting(
        f"backends.cuda.matmul.{name}",
        lambda: getattr(torch._C, f"_get_cublas_{name}")(),
        lambda value: setattr(torch.backends.cuda.matmul, name, value),
    )


def _autocast(device: str) -> tuple[TorchSetting, TorchSetting]:
    return (
        TorchSetting(
            f"autocast of {device}",
            partial(torch.is_autocast_enabled, device),
            partial(torch.set_autocast_enabled, device),
        ),
        TorchSetting(
            f"dtype of autocast of {device}",
            partial(torch.get_autocast_dtype, device),
            partial(torch.set_autocast_dtype, device),
        ),
    )


def _default_device() -> object:
    """Return what ``torch.set_default_device`` has set."""
    # torch.get_default_device would also tell of the caller's own ``with device:``.
    context: Any = torch._GLOBAL_DEVICE_CONTEXT
    mode = getattr(context, "device_context", None)
    return None if mode is None else mode.device


def _current_device() -> int | None:
    # The question itself would initialise CUDA.
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _set_current_device(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


def _set_sparse_checks(enabled: bool) -> None:
    checks: Any = torch.sparse.check_sparse_tensor_invariants
    (checks.enable if enabled else checks.disable)()


_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")

_OF_THE_PROCESS: Sequence[TorchSetting] = (
    _pair("get_default_dtype", "set_default_dtype"),
    _pair_of_tuples(
        "deterministic algorithms",
        (
            torch.are_deterministic_algorithms_enabled,
            torch.is_deterministic_algorithms_warn_only_enabled,
        ),
        lambda enabled, warn_only: torch.use_deterministic_algorithms(enabled, warn_only=warn_only),
    ),
    _attribute("utils.deterministic.fill_uninitialized_memory"),
    _pair_of_tuples(
        "detection of anomalies",
        (torch.is_anomaly_enabled, torch.is_anomaly_check_nan_enabled),
        torch.set_anomaly_enabled,
    ),
    _pair("is_warn_always_enabled", "set_warn_always"),
    TorchSetting(
        "checks of sparse tensors",
        torch.sparse.check_sparse_tensor_invariants.is_enabled,
        _set_sparse_checks,
    ),
    _pair(
        "__future__.get_overwrite_module_params_on_conversion",
        "__future__.set_overwrite_module_params_on_conversion",
    ),
    _pair(
        "__future__.get_swap_module_params_on_conversion",
        "__future__.set_swap_module_params_on_conversion",
    ),
    # The old names of TF32 come first, because setting them sets new ones, too. Then the order is
    # from all backends to single operators.
    _pair("get_float32_matmul_precision", "set_float32_matmul_precision"),
    _attribute("backends.cuda.matmul.allow_tf32"),
    _attribute("backends.cudnn.allow_tf32"),
    _attribute("backends.fp32_precision"),
    _attribute("backends.cudnn.fp32_precision"),
    _attribute("backends.mkldnn.fp32_precision"),
    _attribute("backends.cuda.matmul.fp32_precision"),
    _attribute("backends.cudnn.conv.fp32_precision"),
    _attribute("backends.cudnn.rnn.fp32_precision"),
    _attribute("backends.mkldnn.conv.fp32_precision"),
    _attribute("backends.mkldnn.rnn.fp32_precision"),
    _attribute("backends.mkldnn.matmul.fp32_precision"),
    _attribute("backends.cuda.matmul.allow_fp16_accumulation"),
    _reductions("fp16"),
    _reductions("bf16"),
    _attribute("backends.cudnn.enabled"),
    _attribute("backends.cudnn.benchmark"),
    _attribute("backends.cudnn.benchmark_limit"),
    _attribute("backends.cudnn.deterministic"),
    _attribute("backends.mkldnn.enabled"),
    _attribute("backends.mkldnn.deterministic"),
    _attribute("backends.miopen.immediate"),
    _attribute("backends.opt_einsum.enabled"),
    _attribute("backends.opt_einsum.strategy"),
    _attribute("backends.quantized.engine"),
    _pair("backends.mha.get_fastpath_enabled", "backends.mha.set_fastpath_enabled"),
    _pair("backends.cuda.flash_sdp_enabled", "backends.cuda.enable_flash_sdp"),
    _pair("backends.cuda.mem_efficient_sdp_enabled", "backends.cuda.enable_mem_efficient_sdp"),
    _pair("backends.cuda.math_sdp_enabled", "backends.cuda.enable_math_sdp"),
    _pair("backends.cuda.cudnn_sdp_enabled", "backends.cuda.enable_cudnn_sdp"),
    _pair(
        "backends.cuda.fp16_bf16_reduction_math_sdp_allowed",
        "backends.cuda.allow_fp16_bf16_reduction_math_sdp",
    ),
    _pair("backends.cuda.preferred_linalg_library", "backends.cuda.preferred_linalg_library"),
    _pair("backends.cuda.preferred_blas_library", "backends.cuda.preferred_blas_library"),
)

_OF_THE_THREAD: Sequence[TorchSetting] = (
    _pair("is_grad_enabled", "set_grad_enabled"),
    _pair("get_num_threads", "set_num_threads"),
    _pair("is_autocast_cache_enabled", "set_autocast_cache_enabled"),
    *(setting for device in _AUTOCAST_DEVICES for setting in _autocast(device)),
    TorchSetting("default device", _default_device, torch.set_default_device),
    TorchSetting("device of CUDA", _current_device, _set_current_device),
)
