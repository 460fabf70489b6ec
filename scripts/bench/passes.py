"""What a pass costs: contestants on the same batches, interleaved, as ratios to a plain forward."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fvcore.nn
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.optim.swa_utils import update_bn

import ckpt_tools
from bench.networks import Network
from ckpt_tools import reestimate_bn

Batches = Sequence[Tensor]
Run = Callable[[nn.Module, Batches, ckpt_tools.Walk], object]
TOLERANCE = 0.2  # on a few dozen images, tighter ones would read everything
BASE, OURS = "eval forward, channels last", "reestimate_bn"
PEERS = ("update_bn", "fvcore", "update_bn, channels last", "fvcore, channels last")


@dataclass(frozen=True)
class Contestant:
    """One way over the batches. ``run`` may change the statistics of its own copy of the model."""

    name: str
    run: Run
    channels_last: bool = False
    folded: bool = False
    writes: bool = True  # whether it leaves running variances to be compared


@dataclass(frozen=True)
class Cost:
    """What one contestant took: seconds of each round, and bytes.

    `memory` is the most that a round needed on top of what was in use before it.
    """

    contestant: str
    seconds: tuple[float, ...]
    memory: int
    images: int
    errors: tuple[float, float] | None  # median and largest relative error of the variances against `exact`


def _forward(model: nn.Module, batches: Batches, walk: ckpt_tools.Walk) -> None:
    with torch.inference_mode():
        for batch in batches:
            model(batch)


def _update_bn(model: nn.Module, batches: Batches, walk: ckpt_tools.Walk) -> None:
    update_bn(batches, model)


def _fvcore(model: nn.Module, batches: Batches, walk: ckpt_tools.Walk) -> None:
    model.train()
    fvcore.nn.update_bn_stats(model, batches, len(batches))


def _ours(tolerance: float | None = None) -> Run:
    return lambda model, batches, walk: reestimate_bn(
        model, batches, estimator="pooled", layers="all", walk=walk, force=True, tolerance=tolerance
    )


CONTESTANTS = (
    Contestant("eval forward, NCHW", _forward, writes=False),
    Contestant(BASE, _forward, channels_last=True, writes=False),
    Contestant(
        "eval forward, folded, channels last", _forward, channels_last=True, folded=True, writes=False
    ),
    Contestant("update_bn", _update_bn),
    Contestant("fvcore", _fvcore),
    Contestant("update_bn, channels last", _update_bn, channels_last=True),
    Contestant("fvcore, channels last", _fvcore, channels_last=True),
    Contestant(OURS, _ours()),
    Contestant(f"reestimate_bn, tolerance {TOLERANCE}", _ours(TOLERANCE)),
)


def race(
    network: Network,
    device: str,
    count: int,
    size: int,
    rounds: int,
    *,
    exact: bool,
    contestants: Sequence[Contestant] = CONTESTANTS,
) -> list[Cost]:
    """Every contestant in every round, in an order that rotates. More than eight batches repeat."""
    batches = network.batches(min(count, 8), size, device)
    batches = [batches[number % 8] for number in range(count)]
    original = network.model(device)
    walk = ckpt_tools.walk(original, batches[0][:2])
    truth = _variances(_settle(original, batches, walk)) if exact else {}
    channels_last = {id(batch): batch.to(memory_format=torch.channels_last) for batch in batches}
    by_format = {True: [channels_last[id(batch)] for batch in batches], False: batches}
    models = {contestant.name: _model(original, contestant) for contestant in contestants}
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    memory = dict.fromkeys(seconds, 0)
    images = dict.fromkeys(seconds, count * size)
    for round_ in range(-1, rounds):  # the first one warms up
        turn = (round_ + 1) % len(contestants)
        for contestant in (*contestants[turn:], *contestants[:turn]):
            model = models[contestant.name].eval()
            before = _forget_peak(device)
            started = time.perf_counter()
            result = contestant.run(model, by_format[contestant.channels_last], walk)
            _wait(device)
            if round_ >= 0:
                seconds[contestant.name].append(time.perf_counter() - started)
            memory[contestant.name] = max(memory[contestant.name], _peak(device) - before)
            if isinstance(result, ckpt_tools.Reestimation):
                images[contestant.name] = result.images
    return [
        Cost(
            contestant.name,
            tuple(seconds[contestant.name]),
            memory[contestant.name],
            images[contestant.name],
            _errors(models[contestant.name], truth) if contestant.writes and exact else None,
        )
        for contestant in contestants
    ]


def _settle(model: nn.Module, batches: Batches, walk: ckpt_tools.Walk) -> nn.Module:
    model = copy.deepcopy(model)
    reestimate_bn(model, batches, layers="all", walk=walk, force=True, estimator="exact")
    return model


def _model(original: nn.Module, contestant: Contestant) -> nn.Module:
    model = copy.deepcopy(original)
    if contestant.folded:
        model = fuse(model)
    return model.to(memory_format=torch.channels_last) if contestant.channels_last else model


def _variances(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.double() for name, buffer in model.named_buffers() if name.endswith("running_var")}


def _errors(model: nn.Module, truth: dict[str, Tensor]) -> tuple[float, float]:
    variances = _variances(model)
    errors = torch.cat([(variances[name] / truth[name] - 1).abs()[truth[name] > 0] for name in truth])
    return float(errors.median()), float(errors.max())


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: str) -> int:
    """Memory in use; from here on the peak counts anew."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: str) -> int:
    """Largest memory since it was forgotten: of the device, or resident of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def ratios(costs: Sequence[Cost], base: str) -> dict[str, tuple[float, float, float]]:
    """Return each contestant's time over that of `base` in the same round.

    Of the rounds' ratios, these are the median, the smallest and the largest.
    """
    reference = next(cost.seconds for cost in costs if cost.contestant == base)
    by_contestant = {}
    for cost in costs:
        rounds = [mine / its for mine, its in zip(cost.seconds, reference, strict=True)]
        by_contestant[cost.contestant] = (statistics.median(rounds), min(rounds), max(rounds))
    return by_contestant


def speed_up(costs: Sequence[Cost], peer: str) -> float:
    """How many times faster our pass is than a peer, the median over the rounds."""
    return ratios(costs, OURS)[peer][0]


def table(network: Network, costs: Sequence[Cost]) -> str:
    """Rows of the README's table."""
    lines = [
        "",
        f"| {network.name} | images/s | time / eval forward | memory on top | images "
        "| error, median / worst |",
        "|---|---|---|---|---|---|",
    ]
    to_base = ratios(costs, BASE)
    for cost in costs:
        median, low, high = to_base[cost.contestant]
        error = "" if cost.errors is None else f"{cost.errors[0]:.2%} / {cost.errors[1]:.0%}"
        rate = cost.images / statistics.median(cost.seconds)
        lines.append(
            f"| {cost.contestant} | {rate:.1f} | {median:.2f} ({low:.2f}–{high:.2f}) | "
            f"{cost.memory / 1e6:,.0f} MB | {cost.images} | {error} |"
        )
    return "\n".join(lines)


def summary(raced: Mapping[str, Sequence[Cost]]) -> str:
    """Render the README's table: time / eval forward, channels last.

    The rows below say how many times faster ours is than each peer.
    """
    lines = ["", "| | " + " | ".join(raced) + " |", "|---" * (len(raced) + 1) + "|"]
    for contestant in CONTESTANTS:
        cells = (f"{ratios(costs, BASE)[contestant.name][0]:.2f}" for costs in raced.values())
        lines.append(f"| {contestant.name} | " + " | ".join(cells) + " |")
    for peer in PEERS:
        gains = [speed_up(costs, peer) for costs in raced.values()]
        mean = statistics.geometric_mean(gains)
        lines.append(
            f"| gain over {peer}: {mean:.2f} | " + " | ".join(f"{gain:.2f}" for gain in gains) + " |"
        )
    return "\n".join(lines)
