"""A Lightning callback: checkpoints hold BN running variances for dropout off, and training keeps its own.

Works with ``lightning.pytorch`` and, where only that is there or in use, with ``pytorch_lightning``.
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
from ckpt_tools.contract import Estimator, LayerChoice
from ckpt_tools.errors import CkptToolsError, UsageError
from ckpt_tools.method import Method
from ckpt_tools.results import Reestimation

When = Literal["checkpoint", "end"]

_FRAMEWORKS = ("lightning.pytorch", "pytorch_lightning")
_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}
_ENTRY = "ckpt_tools"  # of a checkpoint: what was done, and the variances of the training itself


def _framework() -> str:
    """The one in use, else the one installed."""
    installed = [name for name in _FRAMEWORKS if find_spec(name.partition(".")[0])]
    if not installed:
        raise ModuleNotFoundError("BNReestimation needs Lightning: pip install 'ckpt-tools[lightning]'.")
    return next((name for name in installed if name in sys.modules), installed[0])


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = import_module(_framework()).Callback


class BNReestimation(Callback):
    """Re-estimates BN running variances with dropout off (Hendrycks & Gimpel 2016, section 3) for what is saved.

    Args:
        when: "checkpoint": every checkpoint that is saved holds corrected variances, while the model in memory goes on
            with those of the training, bit for bit; a training that resumes from the file does, too. "end": the model
            in memory is corrected once when training ends, for ``trainer.test`` and whatever you save then.
        attribute: where the network is, such as "model", if the module's own ``forward`` is not it.
        batches: another source than the training dataloader, such as a loader without augmentation.
        forward: ``forward(network, batch)`` for batches other than a tensor, a tuple or list whose first item is the
            input, or a dict of arguments.
        estimator, layers, tolerance: as in ``ckpt_tools.reestimate_bn``. The default tolerance reads about 1,000
            images; None reads everything.
        limit_batches, max_images: upper bounds of what is read.

    ``result`` is the ``Reestimation`` of the last pass. Batches reach the device by the trainer's own way, with the
    transfer hooks of module and datamodule. Rank 0 reads its own share of the data; others wait. If the model cannot
    be corrected (no BN layer behind dropout, NaN), a warning says so and the checkpoint is saved as it is. Scores that
    choose among checkpoints are those of the validation, made with the variances of the training.
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
        self.when, self.attribute, self.batches = when, attribute, batches
        self.limit_batches, self.max_images = limit_batches, max_images
        self.result: Reestimation | None = None
        # A Method refuses wrong settings now, not hours later. "ema" reads everything, so it has no tolerance.
        self._method = Method(estimator, layers, tolerance=None if estimator == "ema" else tolerance)
        self._forward = forward
        self._last: tuple[tuple[float, ...], dict[str, Tensor]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what could only fail, or go unnoticed, hours later."""
        self._last = None
        if stage != "fit":
            return
        strategies = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        if sharded := strategies & _SHARDED:
            raise UsageError(
                f"BNReestimation: {sharded.pop()} spreads the model over the ranks; expected a strategy that keeps it "
                "whole on each, such as ddp. Run `ckpt-fix bn-reestimate` on the checkpoint instead."
            )
        self._check_forward(pl_module)
        if self.when == "checkpoint":
            self._check_callbacks(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put corrected variances into the checkpoint; the module keeps those it has."""
        if self.when != "checkpoint" or not trainer.is_global_zero:
            return
        state: dict[str, Any] = checkpoint["state_dict"]
        with _load_weights_temporarily(pl_module, state) as foreign:
            new = self._new_variances(trainer, pl_module)
        if new and self.result:
            own = {} if foreign else {key: state[key].detach().clone() for key in new}
            state.update(new)  # made for this checkpoint; the module's tensors are not touched
            checkpoint[_ENTRY] = {**_describe_result(self.result), "training": own}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A training that resumes goes on with the variances of the training."""
        if trainer.state.fn == "fit" and isinstance(entry := checkpoint.get(_ENTRY), Mapping):
            _overwrite(pl_module, entry.get("training", {}))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Correct the model in memory, on every rank alike."""
        if self.when == "end":
            new = self._new_variances(trainer, pl_module) if trainer.is_global_zero else {}
            _overwrite(pl_module, trainer.strategy.broadcast(new))

    def _new_variances(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """By key of the module's state dict. One pass serves all that is saved of the same weights."""
        tensors = [value for value in pl_module.state_dict().values() if isinstance(value, Tensor)]
        sums = tuple(float(tensor.float().sum()) for tensor in tensors)
        if self._last is None or self._last[0] != sums:
            self._last = sums, self._measure_variances(trainer, pl_module)
        return self._last[1]

    def _measure_variances(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        loader, limit = self._loader(trainer)
        results: list[Reestimation] = []
        if loader is None:
            warnings.warn("BNReestimation: no training dataloader at hand; nothing was corrected.", stacklevel=2)
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
        except CkptToolsError as error:  # a lost checkpoint would cost more than an uncorrected one
            warnings.warn(f"BNReestimation: nothing was corrected. {error}", stacklevel=2)
            return {}
        self.result = results[0]
        return _changed_tensors(state, network.state_dict(), f"{self.attribute}." if self.attribute else "")

    def _loader(self, trainer: Trainer) -> tuple[Iterable[object] | None, int | None]:
        """What to read and how many batches of it; of the trainer's own no more than training itself reads."""
        if self.batches is not None:
            return self.batches, self.limit_batches
        loader: Any = trainer.train_dataloader
        if isinstance(loader, (Mapping, list, tuple)):
            raise UsageError(
                f"BNReestimation: the trainer reads {len(loader)} training dataloaders together; expected one. "
                "Say which: BNReestimation(batches=loader)."
            )
        known = [n for n in (self.limit_batches, trainer.num_training_batches) if n and n != float("inf")]
        return loader, int(min(known)) if known else None

    def _check_forward(self, pl_module: LightningModule) -> None:
        forward = type(pl_module).forward
        inherited = forward.__module__.startswith(("lightning.", "pytorch_lightning."))
        if inherited and self.attribute is None and self._forward is None:
            raise UsageError(
                f"BNReestimation: {type(pl_module).__name__} has no forward; expected one that takes the input. "
                "Say where the network is, attribute='model', or how to run it, forward=lambda module, batch: …"
            )

    def _check_callbacks(self, trainer: Trainer) -> None:
        callbacks: list[Any] = list(getattr(trainer, "callbacks", []))
        if any(getattr(other, "save_weights_only", False) for other in callbacks):
            raise UsageError(
                "BNReestimation: ModelCheckpoint(save_weights_only=True) saves without asking any callback. Save whole "
                "checkpoints, or correct the model once training has ended: BNReestimation('end')."
            )
        behind = callbacks[callbacks.index(self) + 1 :]
        if any("WeightAveraging" in {kind.__name__ for kind in type(other).__mro__} for other in behind):
            raise UsageError(
                "BNReestimation stands before the callback that averages weights, which would save others than the "
                "corrected ones. List it behind that one."
            )


def _transfer(trainer: Trainer, pl_module: LightningModule) -> Callable[[object], object]:
    """The trainer's own way of a batch to the device and the dtype of the model."""

    def prepare(batch: object) -> object:
        converted = trainer.precision_plugin.convert_input(batch)
        return trainer.strategy.batch_to_device(converted, device=pl_module.device)

    return prepare


@contextmanager
def _load_weights_temporarily(module: nn.Module, state: Mapping[str, Any]) -> Iterator[bool]:
    """The module with the weights of ``state``: other ones than its own where a callback averages weights.

    Yields whether they are other ones; afterwards the module has its own back.
    """
    live = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    foreign = any(key in state and not torch.equal(state[key].to(value.device), value) for key, value in live.items())
    own = {key: value.detach().clone() for key, value in live.items()} if foreign else {}
    try:
        _overwrite(module, {key: state[key] for key in own if key in state})
        yield foreign
    finally:
        try:
            _overwrite(module, own)
        except BaseException:  # an interrupt in the midst of it: some weights are still those of the average
            _overwrite(module, own)
            raise


def _overwrite(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    live = module.state_dict()
    with torch.no_grad():
        for key, value in values.items():
            live[key].copy_(value)


def _changed_tensors(state: Mapping[str, Any], own: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """What in ``state`` is not the module's own, by key of the whole module."""
    pairs = ((key, value, own[key]) for key, value in state.items() if isinstance(value, Tensor))
    return {f"{prefix}{key}": value for key, value, live in pairs if value.data_ptr() != live.data_ptr()}


def _describe_result(result: Reestimation) -> dict[str, object]:
    """What a checkpoint says about itself, in plain values."""
    return {
        "version": ckpt_tools.__version__,
        "estimator": result.estimator,
        "images": result.images,
        "rewritten": [layer.name for layer in result.rewritten],
        "why": result.why,
    }
