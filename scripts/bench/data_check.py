"""How often the check of the training data is right: false alarms on the right data, misses on
wrong data.

Small nets of many families are trained on what scikit-learn ships. Then random subsets of 256
images, half of them from the training split and half held out, go through the check as they should,
and as they should not. Colliding pairs of architectures (same keys, another function) are told
apart by the data. All 200 subsets take two hours on two cores; --seconds shortens it where a check
takes long, which it does where the data looks suspicious.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import torch
from timm.layers import BlurPool2d
from torch import nn

from bench.image_sets import SIZE, image_set
from bench.trained_nets import IMAGENET, TRAININGS, Training, from_timm, normalisation, train_net, vgg
from bench.wrong_data import CheckInput, Net, right, subset, wrong_kinds
from ckpt_tools import walk
from ckpt_tools.diagnosis.agreement import best_candidate, measure_agreement
from ckpt_tools.diagnosis.data_check import DataVerdict, check_data
from ckpt_tools.errors import ModelError

RESULTS = Path(__file__).parent / "results" / "data_check.json"
FEWEST = 60  # subsets of right data a net
QUANTILES = (0.0, 0.5, 0.95, 0.99, 1.0)


def check_on(net: Net, check_input: CheckInput, *, rates_known: bool = True) -> DataVerdict | None:
    """Return the verdict of the check, or None if the model cannot run on such a batch.

    None counts as an answer, too: a model that raises has refused the data.
    """
    try:
        return check_data(
            net.model,
            [check_input.batch],
            net.walk,
            check_input.spec,
            preprocessed=check_input.spec is None,
            rates_known=rates_known,
            usual_size=(net.data.channels, SIZE, SIZE),
        )
    except ModelError:
        return None


def train_and_walk(training: Training) -> Net:
    data = image_set(training.data)
    model = train_net(training)
    graph = walk(model, torch.zeros(2, data.channels, SIZE, SIZE))
    return Net(training, model, graph, data, *normalisation(training, data))


def measure_net(net: Net, subsets: int, wrong: int, seconds: float) -> dict[str, object]:
    """Measure one net: how often the check refuses right and wrong data.

    Right data gives the false alarms and the quantiles of the scores; wrong data gives the
    refusals, by kind and variant, each as [refused, tried].
    """
    verdicts = list(on_right_data(net, subsets, seconds))
    fair = [verdict for verdict in verdicts if verdict is not None and verdict.scores is not None]
    unknown = [
        check_on(net, right(net, subset(net, n)), rates_known=False) for n in range(min(subsets, wrong))
    ]
    rates: dict[str, dict[str, list[int]]] = {}
    for kind, variant, make in wrong_kinds(net):
        verdicts_on_wrong = [check_on(net, make(net, subset(net, 1000 + number))) for number in range(wrong)]
        ran = [verdict for verdict in verdicts_on_wrong if verdict is not None]
        if ran:  # a model that cannot run on it has refused
            rates.setdefault(kind, {})[variant] = [sum(v.verdict == "refuse" for v in ran), len(ran)]
    return {
        "net": net.training.name,
        "data": net.data.name,
        "false alarms": [sum(v.verdict == "refuse" for v in fair), len(fair)],
        "false alarms, rates unknown": [
            sum(v is not None and v.verdict == "refuse" for v in unknown),
            len(unknown),
        ],
        "scores": {
            name: _quantiles([getattr(v.scores, name) for v in fair]) for name in ("early", "first", "deep")
        },
        "refused": rates,
    }


def on_right_data(net: Net, subsets: int, seconds: float) -> Iterator[DataVerdict | None]:
    """All subsets, or, after FEWEST of them, as many as there is time for."""
    started = time.perf_counter()
    for number in range(subsets):
        if number >= FEWEST and time.perf_counter() - started > seconds:
            return
        yield check_on(net, right(net, subset(net, number)))


def _quantiles(values: list[float]) -> list[float]:
    if not values:
        return []
    points = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64))
    return [round(value, 4) for value in points.tolist()]


@dataclass(frozen=True)
class Pair:
    """Two architectures with the same keys and shapes, and other functions."""

    title: str
    builds: dict[str, Callable[[int], nn.Module]]
    data: str


PAIRS = (
    Pair("pooling", {"max": vgg, "mean": lambda c: vgg(c, nn.AvgPool2d)}, "coloured"),
    Pair("anti-aliasing", {"no": from_timm("resnet10t"),
                           "blur": from_timm("resnet10t", aa_layer=BlurPool2d)}, "photos"),
    Pair("padding", {"symmetric": from_timm("test_efficientnet"),
                     "as in TensorFlow": from_timm("test_efficientnet", pad_type="same")}, "photos"),
    Pair("activation", {"ReLU": from_timm("resnet10t"),
                        "SiLU": from_timm("resnet10t", act_layer="silu")}, "photos"),
)  # fmt: skip


def tell_apart(pair: Pair, wrong: int, epochs: int = 5) -> dict[str, object]:
    """How often the data picks the architecture that was trained."""
    picked = {"right": 0, "wrong": 0, "none": 0}
    ratios = []
    for name, build in pair.builds.items():
        training = Training(
            f"{pair.title}: {name}", build, pair.data, IMAGENET, epochs, 64, "f", "adam", 1e-3
        )
        net = train_and_walk(training)
        candidates = {other: make(net.data.channels) for other, make in pair.builds.items()}
        for model in candidates.values():
            model.load_state_dict(net.model.state_dict())
        for number in range(wrong):
            batch = right(net, subset(net, number)).batch
            scores = {
                other: measure_agreement(model, [batch], net.walk, rates_known=True, normalise="batch")
                for other, model in candidates.items()
            }
            best = best_candidate(scores)
            picked["none" if best is None else "right" if best == name else "wrong"] += 1
            best_other = min(score.score or 0.0 for other, score in scores.items() if other != name)
            ratios.append((scores[name].score or 0.0) / max(best_other, 1e-9))
    return {"pair": pair.title, **picked, "score right / wrong": _quantiles(ratios)}


@click.command(help=__doc__)
@click.option(
    "--subsets", default=200, show_default=True, help="Random subsets of the right data, for each net."
)
@click.option("--seconds", default=math.inf, help=f"For the right data of a net, after {FEWEST} subsets.")
@click.option("--wrong", default=10, show_default=True, help="Subsets for each variant of wrong data.")
@click.option("--only", default="", help="Nets whose name contains this; the others' results stay.")
@click.option("--quick", is_flag=True, help="One small net, few subsets; nothing is stored.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Folder for trained nets.")
@click.option("--jobs", default=2, show_default=True, help="Processes of one thread.")
def main(
    subsets: int, seconds: float, wrong: int, only: str, quick: bool, keep: Path | None, jobs: int
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    started = time.perf_counter()
    chosen = [number for number, training in enumerate(TRAININGS) if only in training.name]
    if quick:
        chosen, subsets, wrong = [n for n in chosen if "mlp" in TRAININGS[n].name][:1], 2, 1
    results = {"nets": [], "pairs": []}
    # Forked, as a training's builder may be a lambda.
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        pairs = range(0 if quick or only else len(PAIRS))
        apart = [pool.submit(_tell_numbered_apart, number, 2 * wrong) for number in pairs]
        for result in pool.map(
            functools.partial(_measure_numbered, subsets=subsets, wrong=wrong, seconds=seconds, keep=keep),
            chosen,
        ):
            results["nets"].append(result)
            click.echo(_line(result))
        results["pairs"] = [pair.result() for pair in apart]
    click.echo(f"{time.perf_counter() - started:.0f} s")
    if only and not quick:
        results = replace_nets(json.loads(RESULTS.read_text()), results["nets"])
    click.echo(table(results))
    if not quick:
        RESULTS.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n")


def replace_nets(stored: dict, nets: list[dict]) -> dict:
    """Stored results with those of some nets in their place."""
    new = {net["net"]: net for net in nets}
    return stored | {"nets": [new.get(net["net"], net) for net in stored["nets"]]}


def _measure_numbered(
    number: int, *, subsets: int, wrong: int, seconds: float, keep: Path | None
) -> dict[str, object]:
    return measure_net(_load_or_train(TRAININGS[number], keep), subsets, wrong, seconds)


def _tell_numbered_apart(number: int, wrong: int) -> dict[str, object]:
    return tell_apart(PAIRS[number], wrong)


def _load_or_train(training: Training, keep: Path | None) -> Net:
    """The net, from an earlier run if there is one."""
    if keep is None:
        return train_and_walk(training)
    keep.mkdir(parents=True, exist_ok=True)
    file = keep / f"{training.name.replace(' ', '_')}.pt"
    if not file.exists():
        torch.save(train_net(training).state_dict(), file)
    data = image_set(training.data)
    model = training.build(data.channels)
    model.load_state_dict(torch.load(file))
    model.eval()
    graph = walk(model, torch.zeros(2, data.channels, SIZE, SIZE))
    return Net(training, model, graph, data, *normalisation(training, data))


def _line(result: dict) -> str:
    alarms, count = result["false alarms"]
    refused = {kind: _share(list(variants.values())) for kind, variants in result["refused"].items()}
    words = ", ".join(f"{kind} {share}" for kind, share in refused.items())
    worst = ", ".join(f"{name} ≤ {values[-1]:.2f}" for name, values in result["scores"].items() if values)
    unknown = "/".join(map(str, result["false alarms, rates unknown"]))
    missed = ", ".join(
        f"{variant} {_share([counts])}"
        for variants in result["refused"].values()
        for variant, counts in variants.items()
        if counts[0] < counts[1]
    )
    return (
        f"{result['net']} ({result['data']}): {alarms}/{count} false alarms (rates unknown {unknown}); "
        f"{worst}; refused: {words}; not always: {missed}"
    )


def _share(counts: list[list[int]]) -> str:
    refused, of = (sum(column) for column in zip(*counts, strict=True))
    return f"{100 * refused / of:.0f} %"


def table(results: dict) -> str:
    """The README's table: kinds with their rates over all nets."""
    kinds: dict[str, dict[str, list[list[int]]]] = {}
    for net in results["nets"]:
        for kind, variants in net["refused"].items():
            for variant, counts in variants.items():
                kinds.setdefault(kind, {}).setdefault(variant, []).append(counts)
    alarms = [net["false alarms"] for net in results["nets"] if net["false alarms"][1]]
    lines = ["", "| data | refused | by variant |", "|---|---|---|"]
    lines.append(f"| the training data | {sum(a for a, _ in alarms)} of {sum(n for _, n in alarms)} | |")
    for kind, variants in kinds.items():
        parts = ", ".join(f"{variant} {_share(counts)}" for variant, counts in variants.items())
        lines.append(f"| {kind} | {_share([c for counts in variants.values() for c in counts])} | {parts} |")
    for pair in results["pairs"]:
        count = pair["right"] + pair["wrong"] + pair["none"]
        lines.append(
            f"| {pair['pair']}: right architecture | {pair['right']} of {count} | wrong {pair['wrong']} |"
        )
    return "\n".join(lines)
