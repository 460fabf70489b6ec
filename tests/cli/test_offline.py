"""The main job, from checkpoint to report, in a process that has no sockets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPT = """
import socket
import sys

asked = []


class Refused(socket.socket):
    def __init__(self, *args, **kwargs):
        asked.append("a socket")
        raise OSError("there is no network here")


def refused(*args, **kwargs):
    asked.append(f"{args[:2]}")
    raise OSError("there is no network here")


socket.socket = socket.SocketType = Refused
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refused
sys.addaudithook(lambda event, args: \
asked.append(event) if event in ("socket.connect", "socket.getaddrinfo") else None)

import timm
import torch

from ckpt_tools.cli import main

torch.manual_seed(0)
torch.set_num_threads(1)
model = timm.create_model("test_resnet", num_classes=2, drop_rate=0.0)
torch.save({"state_dict": model.state_dict(), "args": {"model": "test_resnet", "num_classes": 2}}, "model.pt")
job = ["bn-reestimate", "model.pt", "--data", "train", "--layers", "all", \
"--input-size", "3,16,16", "--force", "-q"]
for command in (
    ["inspect", "model.pt"],
    [*job, "--report", "out.html", "--report", "out.json", "--report", "out.md"],
    ["diff", "model.pt", "model.bn.safetensors"],
    ["convert", "model.pt"],
):
    assert main.main(command, standalone_mode=False) in (None, 0), command
assert not asked, asked
print("done without a network")
"""


def test_the_main_job_needs_no_network(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for number in range(12):
        (tmp_path / "train" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        image.save(tmp_path / "train" / "ab"[number % 2] / f"{number}.png")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done without a network" in done.stdout
    assert (tmp_path / "out.html").stat().st_size > 1000
