"""What test_distributed starts under torchrun: many jobs in a process group; data that fails on one rank."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nets
import torch
from torch import Tensor

from ckpt_tools import reestimate_bn, walk
from ckpt_tools.distributed import Ranks, Team, start_team
from ckpt_tools.errors import CkptToolsError
from ckpt_tools.jobs.plan import prepare_reestimation
from ckpt_tools.jobs.reestimation import execute_reestimation
from ckpt_tools.jobs.request import ModelChoice, ReadingOptions, Request
from ckpt_tools.location import Location
from ckpt_tools.method import Method

JOBS: dict[str, dict[str, object]] = {
    "pooled": {"batch_size": 16},
    "exact": {"batch_size": 16, "estimator": "exact", "tolerance": 0.3},
    "tolerance": {"batch_size": 8, "tolerance": 0.048, "data": "more.npy"},
    "one batch": {"statistics": "mean+variance"},
    "bf16": {"batch_size": 30, "precision": "bf16", "layers": "all"},
    "controls": {"batch_size": 64, "data": "more.npy"},
    "outliers": {"batch_size": 32, "data": "bad.npy", "estimator": "exact"},
    "ratio": {"batch_size": 16, "estimator": "ratio"},
}
THREE = ("pooled", "tolerance", "outliers")  # of three ranks: what depends on their number


def jobs(world: int) -> list[str]:
    """What so many ranks do, one after the other."""
    return [name for name in JOBS if world < 3 or name in THREE]


BROKEN: dict[str, dict[str, object]] = {
    "ema": {"estimator": "ema"},
    "broken": {"data": "ranks:broken"},
    "taken": {"output": Path("pooled.safetensors")},
}


def requested(name: str, options: dict[str, object]) -> Request:
    def group(kind: type[Any], **defaults: object) -> Any:
        """The options that are fields of this dataclass."""
        own = {field: options[field] for field in kind.__dataclass_fields__ if field in options}
        return kind(**{**defaults, **own})

    return Request(
        Location(Path("model.pt")),
        data=str(options.get("data", "data.npy")),
        output=Location(Path(str(options.get("output", f"{name}.safetensors")))),
        model=ModelChoice("nets:DenseNet"),
        method=group(Method, estimator="pooled"),
        reading=group(ReadingOptions, device="cpu"),
    )


def summary(name: str, team: Team) -> dict[str, object]:
    """Everything in a result that several processes must share with one."""
    plan = prepare_reestimation(requested(name, JOBS[name]), team=team)
    outcome = execute_reestimation(plan)
    result = outcome.result
    return {
        "read": [result.images, result.batches, result.passes, result.stopped_early, plan.batch_size],
        "layers": [asdict(layer) for layer in result.layers],
        "controls": asdict(result.controls),
        "deviation": result.deviation and asdict(result.deviation),
        "outliers": sorted([one.name, one.reason] for one in result.outliers),
        "sha256": outcome.output_sha256,
    }


def model_and_batches() -> tuple[torch.nn.Module, list[Tensor]]:
    data = nets.batches((3, 8, 8))
    torch.manual_seed(0)
    return nets.trained(nets.DenseNet(), data), data


def broken() -> Iterator[Tensor]:
    """Batches of which rank 1 cannot read the third."""
    for number, batch in enumerate(nets.batches((3, 8, 8), 6, 16)):
        if number == 2 and os.environ.get("RANK") == "1":
            raise OSError("the disk of rank 1 is broken")
        yield batch


def deadly() -> Iterator[Tensor]:
    """Batches of which the third kills rank 1."""
    for number, batch in enumerate(nets.batches((3, 8, 8), 6, 16)):
        if number == 2 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def main(folder: str) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    with start_team(Ranks.from_environment(), cuda=False) as team:
        told: dict[str, object] = {name: summary(name, team) for name in jobs(team.world)}
        model, data = model_and_batches()
        uneven = [data[:3], [], data[3:]] if team.world == 3 else [data[:3], data[3:]]
        norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
        norm.running_var *= 1 + team.rank  # as DDP leaves them
        result = reestimate_bn(model, uneven[team.rank], distributed=True)
        told["uneven"] = [result.images, result.batches, result.processes]
        told["variances"] = [b.tolist() for name, b in model.named_buffers() if name.endswith("running_var")][
            1:
        ]
        model, data = model_and_batches()
        late = reestimate_bn(
            model, data if team.rank == 1 else [], walk=walk(model, data[0]), distributed=True
        )
        told["late"] = [late.images, late.batches]
        for name, options in BROKEN.items():
            try:
                execute_reestimation(prepare_reestimation(requested(name, options), team=team))
            except CkptToolsError as error:
                told[name] = [type(error).__name__, str(error)]
        Path(f"rank{team.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
