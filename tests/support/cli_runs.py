"""The command line run in this process, and files as raw bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from click.testing import CliRunner, Result

from ckpt_tools.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ok(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def stored(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raw_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Twenty lines that share no code with the project: a safetensors file as bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    return {
        key: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for key, entry in header.items()
        if key != "__metadata__"
    }
