"""The callback in the real Lightning: files hold corrected variances, and the training does not notice."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import oracle
import photograph
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import ckpt_tools
from ckpt_adapters import lightning_callback
from ckpt_adapters.lightning_callback import BNReestimation
from ckpt_tools.errors import UsageError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

LAYERS = {"3", "6"}  # BN layers behind dropout; the one in front of it is a control


def images() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(64, 6, generator=g) * 2 + 1


def network(rate: float = 0.5) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 8), nn.Dropout(rate), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(rate),
        nn.BatchNorm1d(8), nn.Linear(8, 3),
    )  # fmt: skip


class Task(LightningModule):
    """Labels that depend on the input; ``scale`` is what a transfer hook may do on the device."""

    def __init__(self, rate: float = 0.5, scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.scale = network(rate), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [batch[0] * self.scale, *batch[1:]]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Headless(Task):
    forward = LightningModule.forward


def loader(*, shuffle: bool = True) -> DataLoader[Any]:
    x = images()
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16, shuffle=shuffle)


def trainer(folder: Path, *callbacks: Callback, epochs: int = 2, **more: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, callbacks=list(callbacks),
        logger=False, enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip


def saving(folder: Path, **more: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_last=True, **more)


def fit(folder: Path, *callbacks: Callback, task: Task | None = None, **more: Any) -> Task:
    torch.manual_seed(5)
    task = task or Task()
    torch.manual_seed(6)
    trainer(folder, *callbacks, **more).fit(task, loader())
    return task


def exact(*arguments: Any, **more: Any) -> BNReestimation:
    return BNReestimation(*arguments, estimator="exact", tolerance=None, **more)


def plain(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def bits(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {key: value.numpy().tobytes() for key, value in state.items()}


def assert_corrected(state: dict[str, Tensor], inputs: Tensor) -> None:
    """The variances behind dropout are those of the layers' inputs, by ``torch.var`` over all data."""
    model = network()
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    truth = oracle.corrected(model, inputs, LAYERS)
    found = {name: state[f"model.{name}.running_var"] for name in LAYERS}
    assert oracle.relative_difference(found, truth).max() < 1e-3


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {key for key in a if not torch.equal(a[key], b[key])}


def test_files_are_corrected_and_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    callback = exact()
    every = {"every_n_train_steps": 3}  # in the middle of epochs of 4
    task = fit(tmp_path, callback, saving(tmp_path, **every))
    alone = fit(tmp_path / "alone", saving(tmp_path / "alone", **every))
    assert bits(task.state_dict()) == bits(alone.state_dict())
    assert task.training == alone.training
    names = ["last.ckpt", "step=3.ckpt", "step=6.ckpt"]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == names
    for name in names:
        file, other = plain(tmp_path / name), plain(tmp_path / "alone" / name)
        assert differing(file["state_dict"], other["state_dict"]) == {
            f"model.{name}.running_var" for name in LAYERS
        }
        assert_corrected(file["state_dict"], images())
        assert set(file["ckpt_tools"]["rewritten"]) == {f"model.{name}" for name in LAYERS}
    assert callback.result is not None
    assert callback.result.images == len(images())


class Reseeded(Callback):
    """Lightning restores no generators; without this no two trainings would agree."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        torch.manual_seed(trainer.global_step)


def test_a_resumed_training_goes_on_with_its_own_variances(tmp_path: Path) -> None:
    whole, first, again = Task(), Task(), Task()
    first.load_state_dict(whole.state_dict())
    data = loader(shuffle=False)
    trainer(tmp_path, Reseeded(), epochs=3).fit(whole, data)
    trainer(tmp_path, exact(), Reseeded(), saving(tmp_path), epochs=2).fit(first, data)
    assert_corrected(plain(tmp_path / "last.ckpt")["state_dict"], images())
    resumed = trainer(tmp_path, exact(), Reseeded(), saving(tmp_path), epochs=3)
    resumed.fit(again, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert bits(again.state_dict()) == bits(whole.state_dict())
    assert_corrected(plain(tmp_path / "last.ckpt")["state_dict"], images())


def test_one_pass_serves_all_files_of_a_step(tmp_path: Path) -> None:
    class Counted(BNReestimation):
        passes = 0

        def _measure_variances(self, *arguments: Any) -> dict[str, Tensor]:
            self.passes += 1
            return super()._measure_variances(*arguments)

    callback = Counted(max_images=32)
    fit(tmp_path, callback, saving(tmp_path), epochs=2)
    assert len(list(tmp_path.glob("*.ckpt"))) == 3
    assert callback.passes == 2
    assert callback.result is not None
    assert callback.result.images == 32


def test_at_the_end_the_model_in_memory_is_corrected(tmp_path: Path) -> None:
    weights_only = ModelCheckpoint(tmp_path, save_weights_only=True)
    task = fit(tmp_path, exact("end"), weights_only)
    alone = fit(tmp_path)
    assert differing(task.state_dict(), alone.state_dict()) == {
        f"model.{name}.running_var" for name in LAYERS
    }
    assert_corrected(task.state_dict(), images())


def test_batches_take_the_way_of_the_trainer(tmp_path: Path) -> None:
    task = fit(tmp_path, exact("end"), task=Task(scale=3.0))
    assert_corrected(task.state_dict(), images() * 3.0)


@pytest.mark.parametrize("how", ["attribute", "forward"])
def test_a_module_without_a_forward_says_where_the_network_is(tmp_path: Path, how: str) -> None:
    said: dict[str, Any] = {"attribute": "model"}
    if how == "forward":
        said = {"forward": lambda module, batch: module.model(batch[0])}
    fit(tmp_path, exact(**said), saving(tmp_path), task=Headless(), epochs=1)
    assert_corrected(plain(tmp_path / "last.ckpt")["state_dict"], images())
    with pytest.raises(UsageError, match="Headless has no forward"):
        fit(tmp_path / "second", BNReestimation(), task=Headless())


def test_another_loader(tmp_path: Path) -> None:
    others = images() + 1
    task = fit(tmp_path, exact("end", batches=[[others[:32]], [others[32:]]]))
    assert_corrected(task.state_dict(), others)
    torch.manual_seed(5)
    with pytest.raises(UsageError, match="2 training dataloaders"):
        trainer(tmp_path, BNReestimation("end")).fit(Pairs(), [loader(), loader()])


class Pairs(Task):
    def training_step(self, batch: list[list[Tensor]], number: int) -> Tensor:
        return super().training_step(batch[0], number)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def test_averaged_weights_are_corrected_as_averages(tmp_path: Path) -> None:
    callbacks = [WeightAveraging(use_buffers=True), exact(), saving(tmp_path)]
    fit(tmp_path, *callbacks)
    file = plain(tmp_path / "last.ckpt")
    assert differing(file["state_dict"], file["current_model_state"])
    assert_corrected(file["state_dict"], images())
    alone = tmp_path / "alone"
    fit(alone, WeightAveraging(use_buffers=True), saving(alone))
    assert bits(file["current_model_state"]) == bits(plain(alone / "last.ckpt")["current_model_state"])
    with pytest.raises(UsageError, match="behind"):
        fit(tmp_path / "wrong", exact(), WeightAveraging())


class Restless(Task):
    """Changes itself and torch's settings in every forward that is not of the training."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            self.model[1].weight.data.add_(0.1)
            self.model[7].weight.requires_grad_(False).grad = None
            self.register_buffer("last", x)
            torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        return self.model(x)


class Watched(BNReestimation):
    """Compares the module and the process before and after a save."""

    saves = 0

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        before = photograph.of_model(pl_module), photograph.of_process()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        assert photograph.differences(before[0], photograph.of_model(pl_module)) == []
        assert photograph.differences(before[1], photograph.of_process()) == []
        self.saves += 1


def test_a_forward_that_changes_the_module_leaves_nothing_behind(tmp_path: Path) -> None:
    callback = Watched(tolerance=None)
    fit(tmp_path, callback, saving(tmp_path), task=Restless())
    assert callback.saves
    assert callback.result is not None


def test_what_cannot_be_corrected_is_said_and_saved(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing was corrected.*every drop rate is zero"):
        fit(tmp_path, BNReestimation(), saving(tmp_path), task=Task(rate=0.0), epochs=1)
    assert "ckpt_tools" not in plain(tmp_path / "last.ckpt")


def test_mistakes_are_refused_before_training(tmp_path: Path) -> None:
    for wrong in ({"when": "never"}, {"estimator": "mean"}, {"layers": "some"}):
        with pytest.raises(UsageError, match="expected one of"):
            BNReestimation(**wrong)
    with pytest.raises(UsageError, match="save_weights_only"):
        fit(tmp_path, BNReestimation(), ModelCheckpoint(tmp_path, save_weights_only=True))


def test_the_command_line_reads_the_file(tmp_path: Path) -> None:
    from ckpt_tools.storage.reading import read_checkpoint

    fit(tmp_path, BNReestimation(), saving(tmp_path), epochs=1)
    found = read_checkpoint(tmp_path / "last.ckpt")
    assert bits(dict(found.tensors)) == bits(
        {
            key.removeprefix(found.prefix): value
            for key, value in plain(tmp_path / "last.ckpt")["state_dict"].items()
        }
    )
    restored = Task.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert set(restored.state_dict()) == set(Task().state_dict())
    assert ckpt_tools.__version__ == plain(tmp_path / "last.ckpt")["ckpt_tools"]["version"]


def test_the_older_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pytorch_lightning as pl

    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    spec = importlib.util.spec_from_file_location(
        "callback_of_the_older_namespace", lightning_callback.__file__
    )
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert issubclass(fresh.BNReestimation, pl.Callback)

    class OldTask(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        forward, training_step, configure_optimizers = (
            Task.forward,
            Task.training_step,
            Task.configure_optimizers,
        )

    callbacks = [fresh.BNReestimation(), pl.callbacks.ModelCheckpoint(tmp_path, filename="model")]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    old = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, default_root_dir=tmp_path, **quiet)
    old.fit(OldTask(), loader())
    assert plain(tmp_path / "model.ckpt")["ckpt_tools"]["rewritten"]


@pytest.mark.filterwarnings("ignore")
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = (
        text for text in re.findall(r"```python\n(.+?)```", readme, re.DOTALL) if "BNReestimation" in text
    )
    monkeypatch.chdir(tmp_path)
    exec(block, {"module": Task(), "loader": loader()})
    assert plain(tmp_path / "checkpoints" / "last.ckpt")["ckpt_tools"]["rewritten"]
