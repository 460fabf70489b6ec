"""Files of every format, written by the libraries that write them in the wild."""

from __future__ import annotations

import argparse
import copy
import io
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from ckpt_tools.contract import Checkpoint

Maker = Callable[[nn.Module, Path], Path]


def maker_id(maker: Maker) -> str:
    return maker.__name__


class Net(nn.Module):
    """What the formats must carry: convolutions, BN layers behind dropout, a counter, a buffer of its own."""

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(rate),
            nn.Conv2d(6, 8, 3),
            nn.BatchNorm2d(8),
        )
        self.head = nn.Linear(8, 5)
        self.register_buffer("scale", torch.full((1,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3))) * self.scale


def trained() -> nn.Module:
    """A net whose BN layers have seen three batches."""
    model = Net().train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 8, 8) + 1)
    return model.eval()


def assert_holds(checkpoint: Checkpoint, state: dict[str, Tensor], prefix: str = "") -> None:
    assert set(checkpoint.tensors) == {prefix + key for key in state}
    for key, tensor in state.items():
        found = checkpoint.tensors[prefix + key]
        assert type(found) is Tensor
        assert not found.requires_grad
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)


def example() -> Tensor:
    return torch.randn(2, 3, 8, 8)


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"):
        yield


def optimizer_state(model: nn.Module) -> dict[str, object]:
    """Of AdamW after one step on a copy."""
    twin = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(twin.parameters())
    twin(example()).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def state_dict(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "plain.pt")
    return folder / "plain.pt"


def whole_module(model: nn.Module, folder: Path) -> Path:
    torch.save(model, folder / "whole.pt")
    return folder / "whole.pt"


def whole_module_legacy(model: nn.Module, folder: Path) -> Path:
    with quietly():
        torch.save(model, folder / "whole_legacy.pt", _use_new_zipfile_serialization=False)
    return folder / "whole_legacy.pt"


def data_parallel(model: nn.Module, folder: Path) -> Path:
    torch.save({"model": nn.DataParallel(model), "epoch": 3}, folder / "parallel.pt")
    return folder / "parallel.pt"


def pickled_module(model: nn.Module, folder: Path) -> Path:
    (folder / "model.pkl").write_bytes(pickle.dumps(model))
    return folder / "model.pkl"


def ultralytics(model: nn.Module, folder: Path) -> Path:
    content = {
        "epoch": -1,
        "model": None,
        "ema": model,
        "optimizer": None,
        "train_args": {"lr0": 0.01},
        "updates": 9,
    }
    torch.save(content, folder / "best.pt")
    return folder / "best.pt"


def detectron2(model: nn.Module, folder: Path) -> Path:
    arrays = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    (folder / "R-50.pkl").write_bytes(
        pickle.dumps({"model": arrays, "__author__": "me", "matching_heuristics": True})
    )
    return folder / "R-50.pkl"


def deepspeed(model: nn.Module, folder: Path) -> Path:
    content = {"module": model.state_dict(), "buffer_names": ["scale"], "optimizer": None, "global_steps": 3}
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    return folder / "mp_rank_00_model_states.pt"


def mmcv(model: nn.Module, folder: Path) -> Path:
    content = {"meta": {"epoch": 1, "CLASSES": ("a", "b")}, "state_dict": model.state_dict()}
    torch.save({**content, "optimizer": optimizer_state(model)}, folder / "epoch_1.pth")
    return folder / "epoch_1.pth"


def averaged_model(model: nn.Module, folder: Path) -> Path:
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), folder / "swa.pt")
    return folder / "swa.pt"


def averaged_model_whole(model: nn.Module, folder: Path) -> Path:
    torch.save(torch.optim.swa_utils.AveragedModel(model), folder / "swa_whole.pt")
    return folder / "swa_whole.pt"


def torchvision_reference(model: nn.Module, folder: Path) -> Path:
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    other = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    content = {
        "model": other,
        "model_ema": average.state_dict(),
        "optimizer": optimizer_state(model),
        "epoch": 2,
    }
    torch.save({**content, "args": argparse.Namespace(model="resnet18", lr=0.1)}, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


def scripted(model: nn.Module, folder: Path) -> Path:
    with quietly():
        torch.jit.save(torch.jit.script(model), folder / "scripted.pt")
    return folder / "scripted.pt"


def traced(model: nn.Module, folder: Path) -> Path:
    with quietly():
        torch.jit.save(torch.jit.trace(model.eval(), example()), folder / "traced.pt")
    return folder / "traced.pt"


def frozen(model: nn.Module, folder: Path) -> Path:
    with quietly():
        torch.jit.save(torch.jit.freeze(torch.jit.script(model.eval())), folder / "frozen.pt")
    return folder / "frozen.pt"


def program(model: nn.Module) -> torch.export.ExportedProgram:
    with quietly():
        return torch.export.export(model.eval(), (example(),))


def exported(model: nn.Module, folder: Path) -> Path:
    with quietly():
        torch.export.save(program(model), folder / "exported.pt2")
    return folder / "exported.pt2"


def exported_2_6(model: nn.Module, folder: Path) -> Path:
    """As torch.export.save of torch 2.6 and before."""
    from torch._export.serde.serialize import serialize

    with quietly():
        artifact = serialize(program(model))
    with zipfile.ZipFile(folder / "exported_2_6.pt2", "w") as archive:
        archive.writestr("version", "8.2")
        archive.writestr("serialized_exported_program.json", artifact.exported_program)
        archive.writestr("serialized_state_dict.pt", artifact.state_dict)
        archive.writestr("serialized_constants.pt", artifact.constants)
        archive.writestr("serialized_example_inputs.pt", artifact.example_inputs)
    return folder / "exported_2_6.pt2"


def exported_2_8(model: nn.Module, folder: Path) -> Path:
    """As torch.export.save of torch 2.7 and 2.8: the archive of today with a pickle for the weights."""
    from torch._export.serde.serialize import serialize
    from torch.export.pt2_archive._package import PT2ArchiveWriter

    with quietly():
        artifact = serialize(program(model))
        with PT2ArchiveWriter(str(folder / "exported_2_8.pt2")) as archive:
            archive.write_bytes("data/weights/model.pt", artifact.state_dict)
            archive.write_bytes("data/constants/model.pt", artifact.constants)
            archive.write_bytes("models/model.json", artifact.exported_program)
    return folder / "exported_2_8.pt2"


def old_tar(path: Path, tensors: dict[str, Tensor]) -> None:
    """What torch.save wrote in 2016, from the reader that torch.load still has."""
    storages = pickle.dumps(len(tensors), 2)
    described = pickle.dumps(len(tensors), 2)
    for at, tensor in enumerate(tensors.values()):
        storages += pickle.dumps((at, "cpu", torch.FloatStorage), 2) + struct.pack("<q", tensor.numel())
        storages += tensor.numpy().tobytes()
        described += pickle.dumps((100 + at, at, torch.FloatTensor), 2) + struct.pack("<ii", tensor.dim(), 0)
        described += struct.pack(f"<{2 * tensor.dim() + 1}q", *tensor.shape, *tensor.stride(), 0)
    storages += pickle.dumps([], 2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            found = [str(100 + at) for at, tensor in enumerate(tensors.values()) if obj is tensor]
            return found[0] if found else None

    target = io.BytesIO()
    Pickler(target, 2).dump(tensors)
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        system = pickle.dumps({"protocol_version": 1000, "little_endian": True}, 2)
        members = {
            "sys_info": system,
            "pickle": target.getvalue(),
            "tensors": described,
            "storages": storages,
        }
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def distributed(model: nn.Module, folder: Path) -> Path:
    content = {"model": model.state_dict(), "optim": optimizer_state(model), "epoch": 3, "args": {"lr": 0.1}}
    with quietly():
        dcp.save(content, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def distributed_flat(model: nn.Module, folder: Path) -> Path:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    with quietly():
        dcp.save(model.state_dict(), checkpoint_id=folder / "dcp_flat", planner=planner, no_dist=True)
    return folder / "dcp_flat"


class Ranks(dcp.DefaultSavePlanner):
    """Plans the saving of one of two ranks, with every tensor cut along its first dimension, as FSDP does."""

    def __init__(self, state: dict[str, Tensor], rank: int) -> None:
        super().__init__(flatten_state_dict=False)
        self.parts = {key: self.cut(tensor, rank) for key, tensor in state.items()}
        self.state = state

    @staticmethod
    def cut(tensor: Tensor, rank: int) -> tuple[tuple[int, ...], Tensor]:
        half = (tensor.shape[0] + 1) // 2 if tensor.dim() else 0
        start = (rank * half, *[0] * (tensor.dim() - 1)) if tensor.dim() else ()
        return start, (tensor[rank * half : rank * half + half] if tensor.dim() else tensor)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self.item(key) for key, (start, part) in self.parts.items() if part.numel()])
        return self.plan

    def item(self, key: str) -> WriteItem:
        start, part = self.parts[key]
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(start), part.size()),
            properties=TensorProperties.create_from_tensor(part),
            size=self.state[key].size(),
        )
        return WriteItem(MetadataIndex(key, start), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.parts[write_item.index.fqn][1].detach()


def save_by_ranks(model: nn.Module, writer: dcp.FileSystemWriter) -> None:
    """What two ranks write, one after the other in one process; counters come from the first."""
    state = model.state_dict()
    scalars = {key for key, tensor in state.items() if not tensor.dim()}
    planners = [
        Ranks(state, 0),
        Ranks({key: tensor for key, tensor in state.items() if key not in scalars}, 1),
    ]
    plans = []
    for rank, planner in enumerate(planners):
        planner.set_up_planner(planner.state, is_coordinator=rank == 0)
        plans.append(planner.create_local_plan())
    plans, metadata = planners[0].create_global_plan(plans)
    writer.set_up_storage_writer(True)
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    results = [writer.write_data(plan, planner).wait() for plan, planner in zip(plans, planners, strict=True)]
    writer.finish(metadata, results)


def distributed_two_ranks(model: nn.Module, folder: Path) -> Path:
    save_by_ranks(model, dcp.FileSystemWriter(folder / "dcp_ranks"))
    return folder / "dcp_ranks"


def hugging_face_two_ranks(model: nn.Module, folder: Path) -> Path:
    with quietly():
        (folder / "hf_ranks").mkdir()
        save_by_ranks(model, dcp.HuggingFaceStorageWriter(str(folder / "hf_ranks"), save_distributed=True))
    return folder / "hf_ranks"


def distributed_hugging_face(model: nn.Module, folder: Path) -> Path:
    with quietly():
        writer = dcp.HuggingFaceStorageWriter(str(folder / "dcp_hf"))
        dcp.save(model.state_dict(), storage_writer=writer, no_dist=True)
    return folder / "dcp_hf"


def lightning_ckpt(model: nn.Module, folder: Path, *callbacks: object, **options: object) -> Path:
    """A real run of one step whose module keeps the model as ``model``; the model ends as it was."""
    with quietly():
        import lightning

        class Task(lightning.LightningModule):
            def __init__(self, arch: str = "resnet18", lr: float = 0.0) -> None:
                super().__init__()
                self.save_hyperparameters()
                self.model = model

            def training_step(self, batch: Tensor) -> Tensor:
                return self.model.eval()(batch).sum() * 0

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), 0.0)

        flags = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        }
        trainer = lightning.Trainer(
            max_epochs=1,
            default_root_dir=folder,
            enable_checkpointing=False,
            callbacks=list(callbacks),
            **flags,
        )
        saver = Saver(folder / "last.ckpt")
        trainer.callbacks.append(saver.callback())
        trainer.fit(Task(), torch.utils.data.DataLoader(list(example()), batch_size=2))
    return folder / "last.ckpt"


class Saver:
    """Saves while the run goes on, as ModelCheckpoint does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def callback(self) -> object:
        import lightning

        path = self.path

        class Save(lightning.Callback):
            def on_train_batch_end(self, trainer: object, *_: object) -> None:
                trainer.save_checkpoint(path)

        return Save()


# Every maker whose file holds the model's state dict under its own names:
# formats that keep the order, and others.
ORDERED: tuple[Maker, ...] = (
    state_dict, whole_module, whole_module_legacy, data_parallel, pickled_module, ultralytics, detectron2,
    deepspeed, mmcv, averaged_model, averaged_model_whole, torchvision_reference, scripted, traced,
    distributed, distributed_flat, distributed_two_ranks, distributed_hugging_face,
)  # fmt: skip
FORMATS: tuple[Maker, ...] = (*ORDERED, exported, exported_2_6, exported_2_8, hugging_face_two_ranks)
