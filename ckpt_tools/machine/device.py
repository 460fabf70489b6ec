"""The device of a job, and how a model is laid out on it."""

from __future__ import annotations

import torch
from torch import nn

from ckpt_tools.distributed import Ranks
from ckpt_tools.errors import ModelError, UsageError


def move_to_device(model: nn.Module, device: str) -> nn.Module:
    """The model on its device, channels last where its weights have no more than two spatial dimensions."""
    model = model.to(device)
    if any(tensor.ndim > 4 for tensor in (*model.parameters(), *model.buffers())):  # torch refuses those
        return model
    return model.to(memory_format=torch.channels_last)


def resolve_device(said: str, ranks: Ranks = Ranks()) -> str:  # noqa: B008 - frozen
    """What ``--device`` means on this machine: of several ranks each gets the GPU with its number.

    Raises UsageError, ModelError for a device that is not there.
    """
    if said == "auto":
        said = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.local_world > 1 and said.startswith("cuda"):
        if said != "cuda":
            raise UsageError(
                f"--device {said}: expected auto, cpu or cuda under torchrun; each rank takes its own GPU."
            )
        said = f"cuda:{ranks.local_rank}"
    try:
        kind, index = torch.device(said).type, torch.device(said).index or 0
    except RuntimeError:
        kind, index = "unknown", 0
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {said}: expected auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise ModelError(
            f"--device {said}: this machine has no such CUDA device that torch {torch.__version__} can use. "
            "Use --device cpu, or install a CUDA build of torch and its driver."
        )
    return said
