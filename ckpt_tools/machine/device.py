"""The device of a job, and how a model is laid out on it."""

from __future__ import annotations

import torch
from torch import nn

from ckpt_tools.distributed import Ranks
from ckpt_tools.errors import ModelError, UsageError


def move_to_device(model: nn.Module, device: str) -> nn.Module:
    """Move a model to its device, in channels-last layout where that is possible.

    Channels last makes convolutions over images faster. A model with tensors of more than four
    dimensions (video, volumes) keeps its layout.
    """
    model = model.to(device)
    # torch raises if a module with such tensors is converted.
    if any(tensor.ndim > 4 for tensor in (*model.parameters(), *model.buffers())):
        return model
    return model.to(memory_format=torch.channels_last)


def resolve_device(option: str, ranks: Ranks = Ranks()) -> str:  # noqa: B008 - frozen
    """Return the device that the option ``--device`` means on this machine.

    Of several ranks each gets the GPU with its number.

    Raises:
        UsageError: the option is none of auto, cpu, cuda and cuda:N.
        ModelError: this machine has no such device.
    """
    device = option
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.local_world > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise UsageError(
                f"--device {device}: expected auto, cpu or cuda under torchrun, where each rank "
                "takes its own GPU. Use --device cuda."
            )
        device = f"cuda:{ranks.local_rank}"
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:  # torch does not know the word
        kind, index = "unknown", 0
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: expected auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise ModelError(
            f"--device {device}: this machine has no such CUDA device that torch "
            f"{torch.__version__} can use. "
            "Use --device cpu, or install a CUDA build of torch and its driver."
        )
    return device
