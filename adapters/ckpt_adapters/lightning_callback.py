"""A Lightning callback that corrects BN running variances for dropout in the checkpoints that are
saved.

It works with `lightning.pytorch`, and with `pytorch_lightning` where only that one is installed or
in use.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

import ckpt_tools
from ckpt_tools.arguments import check_count
from ckpt_tools.contract import Estimator, LayerChoice
from ckpt_tools.errors import CkptToolsError, UsageError
from ckpt_tools.method import Method
from ckpt_tools.results import Reestimation

When = Literal["checkpoint", "end"]

_FRAMEWORKS = ("lightning.pytorch", "pytorch_lightning")
_SHARDING_STRATEGIES = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}
# The checkpoint's entry for what was done, and for the variances of the training itself.
_ENTRY = "ckpt_tools"


def _framework() -> str:
    """Return the name of the framework that is in use, else of the one that is installed."""
    installed = [name for name in _FRAMEWORKS if find_spec(name.partition(".")[0])]
    if not installed:
        raise ModuleNotFoundError("BNReestimation needs Lightning: pip install 'ckpt-tools[lightning]'.")
    return next((name for name in installed if name in sys.modules), installed[0])


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = import_module(_framework()).Callback


class BNReestimation(Callback):
    """Re-estimates BN running variances with dropout off (Hendrycks & Gimpel 2016, section 3).

    Args:
        when: With "checkpoint", every checkpoint that is saved holds corrected variances, while the
            model in memory goes on with those of the training, bit for bit. So does a training
            that resumes from the file. With "end", the model in memory is corrected once when
            training ends, for `trainer.test` and for what you save then.
        attribute: The attribute that holds the network, such as "model", if the module has no
            `forward` of its own.
        batches: Another source than the training dataloader, such as a loader without augmentation.
        forward: `forward(network, batch)` for batches other than a tensor, a tuple or list whose
            first item is the input, or a dict of arguments.
        estimator, layers, tolerance: As in `ckpt_tools.reestimate_bn`. The default tolerance reads
            about 1,000 images; None reads everything.
        limit_batches, max_images: Upper bounds of what is read.

    `result` is the `Reestimation` of the last pass. Batches reach the device in the trainer's own
    way, with the transfer hooks of module and datamodule. Rank 0 reads its own share of the data,
    and the other ranks wait. If the model cannot be corrected (no BN layer behind dropout, NaN), a
    warning says so and the checkpoint is saved as it is. The scores that choose among checkpoints
    are those of the validation, which runs with the variances of the training.
    """

    def __init__(
        self,
        when: When = "checkpoint",
        *,
        attribute: str | None = None,
        batches: Iterable[object] | None = None,
        forward: Callable[[nn.Module, object], object] | None = None,
        estimator: Estimator = "pooled",
        layers: LayerChoice = "auto",
        tolerance: float | None = 0.05,
        limit_batches: int | None = None,
        max_images: int | None = None,
    ) -> None:
        super().__init__()
        if when not in get_args(When):
            raise UsageError(f"BNReestimation(when={when!r}): expected one of {', '.join(get_args(When))}.")
        check_count("limit_batches", limit_batches)
        check_count("max_images", max_images)
        self.when, self.attribute, self.batches = when, attribute, batches
        self.limit_batches, self.max_images = limit_batches, max_images
        self.result: Reestimation | None = None
        # A Method refuses wrong settings now, not hours later. "ema" reads everything, so it has no
        # tolerance.
        self._method = Method(estimator, layers, tolerance=None if estimator == "ema" else tolerance)
        self._forward = forward
        # The last new variances, and the sums of the tensors that they belong to.
        self._last: tuple[tuple[float, ...], dict[str, Tensor]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise UsageError for settings that would fail, or silently do nothing, hours later."""
        self._last = None
        if stage != "fit":
            return
        strategies = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        if sharding := strategies & _SHARDING_STRATEGIES:
            raise UsageError(
                f"BNReestimation: {sharding.pop()} spreads the model over the ranks; expected a "
                "strategy that keeps it whole on each, such as ddp. Run `ckpt-fix bn-reestimate` "
                "on the checkpoint instead."
            )
        self._check_forward(pl_module)
        if self.when == "checkpoint":
            self._check_callbacks(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put corrected variances into the checkpoint. The module keeps its own.

        The variances of the training are stored beside them, for `on_load_checkpoint`.
        """
        if self.when != "checkpoint" or not trainer.is_global_zero:
            return
        state: dict[str, Any] = checkpoint["state_dict"]
        with _load_weights_temporarily(pl_module, state) as is_average:
            variances = self._new_variances(trainer, pl_module)
        if variances and self.result:
            # The variances of averaged weights are not those that the training goes on with.
            training = {} if is_average else {key: state[key].detach().clone() for key in variances}
            # This replaces entries of the checkpoint's dict. The module's tensors are not touched.
            state.update(variances)
            checkpoint[_ENTRY] = {**_describe_result(self.result), "training": training}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Give a training that resumes the variances of the training back."""
        entry = checkpoint.get(_ENTRY)
        if trainer.state.fn == "fit" and isinstance(entry, Mapping):
            _overwrite(pl_module, entry.get("training", {}))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Correct the model in memory, on every rank alike."""
        if self.when == "end":
            # Rank 0 alone measures, so that all ranks get the same numbers.
            variances = self._new_variances(trainer, pl_module) if trainer.is_global_zero else {}
            _overwrite(pl_module, trainer.strategy.broadcast(variances))

    def _new_variances(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return the corrected variances by key of the module's state dict.

        Several checkpoints may be saved of the same weights (best, last). One pass serves them all.
        """
        tensors = [value for value in pl_module.state_dict().values() if isinstance(value, Tensor)]
        sums = tuple(float(tensor.float().sum()) for tensor in tensors)
        if self._last is None or self._last[0] != sums:
            self._last = sums, self._measure_variances(trainer, pl_module)
        return self._last[1]

    def _measure_variances(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        loader, limit = self._loader(trainer)
        results: list[Reestimation] = []
        if loader is None:
            warnings.warn(
                "BNReestimation: no training dataloader at hand; nothing was corrected.",
                stacklevel=2,
            )
            return {}
        network = pl_module.get_submodule(self.attribute or "")
        correct = ckpt_tools.corrected_state_dict
        if self._forward is not None:
            correct = partial(correct, forward=self._forward)
        try:
            state = correct(
                network,
                loader,
                prepare=_transfer(trainer, pl_module),
                limit_batches=limit,
                max_images=self.max_images,
                done=results.append,
                estimator=self._method.estimator,
                layers=self._method.layers,
                tolerance=self._method.tolerance,
            )
        except UsageError:
            raise
        except CkptToolsError as error:
            # A lost checkpoint would cost more than an uncorrected one.
            warnings.warn(f"BNReestimation: nothing was corrected. {error}", stacklevel=2)
            return {}
        self.result = results[0]
        prefix = f"{self.attribute}." if self.attribute else ""
        return _changed_tensors(state, network.state_dict(), prefix)

    def _loader(self, trainer: Trainer) -> tuple[Iterable[object] | None, int | None]:
        """Return what to read, and the largest number of batches (None: all).

        Of the trainer's own dataloader no more is read than training itself reads.
        """
        if self.batches is not None:
            return self.batches, self.limit_batches
        loader: Any = trainer.train_dataloader
        if isinstance(loader, (Mapping, list, tuple)):
            raise UsageError(
                f"BNReestimation: the trainer reads {len(loader)} training dataloaders together; "
                "expected one. Say which: BNReestimation(batches=loader)."
            )
        # The number is infinite for an iterable dataset without a length.
        bounds = [
            number
            for number in (self.limit_batches, trainer.num_training_batches)
            if number and number != float("inf")
        ]
        return loader, int(min(bounds)) if bounds else None

    def _check_forward(self, pl_module: LightningModule) -> None:
        forward = type(pl_module).forward
        inherited = forward.__module__.startswith(("lightning.", "pytorch_lightning."))
        if inherited and self.attribute is None and self._forward is None:
            raise UsageError(
                f"BNReestimation: {type(pl_module).__name__} has no forward; expected one that "
                "takes the input. Say where the network is, attribute='model', or how to run it, "
                "forward=lambda module, batch: …"
            )

    def _check_callbacks(self, trainer: Trainer) -> None:
        callbacks: list[Any] = list(getattr(trainer, "callbacks", []))
        if any(getattr(callback, "save_weights_only", False) for callback in callbacks):
            raise UsageError(
                "BNReestimation: ModelCheckpoint(save_weights_only=True) saves without asking any "
                "callback. Save whole checkpoints, or correct the model once training has ended: "
                "BNReestimation('end')."
            )
        # Callbacks are called in their order, and weight averaging replaces the weights that are
        # saved.
        for callback in callbacks[callbacks.index(self) + 1 :]:
            if "WeightAveraging" in {kind.__name__ for kind in type(callback).__mro__}:
                raise UsageError(
                    "BNReestimation stands before the callback that averages weights, which would "
                    "save others than the corrected ones. List it behind that one."
                )


def _transfer(trainer: Trainer, pl_module: LightningModule) -> Callable[[object], object]:
    """Return a function that brings a batch to the model as the trainer does.

    It converts the batch to the trainer's precision and moves it to the model's device.
    """

    def prepare(batch: object) -> object:
        converted = trainer.precision_plugin.convert_input(batch)
        return trainer.strategy.batch_to_device(converted, device=pl_module.device)

    return prepare


@contextmanager
def _load_weights_temporarily(module: nn.Module, state: Mapping[str, Any]) -> Iterator[bool]:
    """Give the module the weights of `state` while the block runs.

    They differ from the module's own where a callback averages weights. Yields whether they differ.
    """
    live = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    differs = any(
        key in state and not torch.equal(state[key].to(value.device), value) for key, value in live.items()
    )
    backup = {key: value.detach().clone() for key, value in live.items()} if differs else {}
    try:
        _overwrite(module, {key: state[key] for key in backup if key in state})
        yield differs
    finally:
        try:
            _overwrite(module, backup)
        except BaseException:
            # After an interrupt in the middle of it, some weights are still those of the average.
            _overwrite(module, backup)
            raise


def _overwrite(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    live = module.state_dict()
    with torch.no_grad():
        for key, value in values.items():
            live[key].copy_(value)


def _changed_tensors(state: Mapping[str, Any], live: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of `state` that are not the `live` ones, by key of the whole module.

    `corrected_state_dict` makes new tensors for what it corrects, and shares all others with the
    module.
    """
    return {
        f"{prefix}{key}": value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.data_ptr() != live[key].data_ptr()
    }


def _describe_result(result: Reestimation) -> dict[str, object]:
    """Return what a checkpoint records about its correction, in plain values."""
    return {
        "version": ckpt_tools.__version__,
        "estimator": result.estimator,
        "images": result.images,
        "rewritten": [layer.name for layer in result.rewritten],
        "why": result.why,
    }
