"""Measure how well the index recognises the architecture of a bare state dict.

Every timm and torchvision model is looked up by its names and shapes, which come from models
without weights; the look-up sees nothing else of a file.

\b
scripts/run recognise                as built, with 7 classes, with 1 channel, under a prefix
scripts/run recognise --closest 60   and of 60, one block renamed or a layer added:
                                     is the original among the closest three?
scripts/run recognise --twins        and which colliding architectures compute the same function
scripts/run recognise --saved 40     and 40 models saved by torch.save, loaded by ckpt_tools.load
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from torch import nn
from tqdm import tqdm

import ckpt_tools
from build_index import no_initialisation
from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import AmbiguousArchitecture, ArchitectureError
from ckpt_tools.identify import plugins
from ckpt_tools.identify.architecture_index import load_shipped_index
from ckpt_tools.identify.candidate import Candidate
from ckpt_tools.identify.closest_architectures import find_closest_architectures
from ckpt_tools.identify.equivalents import merge_equivalent_candidates
from ckpt_tools.identify.recipe import recipe_without_arguments
from ckpt_tools.identify.shape_digest import Shapes
from ckpt_tools.identify.skeleton import build_skeleton, state_dict_shapes
from zoo.models import Checked, architectures, brief, check_all

LARGEST = 1_000_000_000  # parameters of the models that count
SMALL = 60_000_000  # parameters of the models that are saved
VARIANTS: dict[str, dict[str, object]] = {
    "as built": {},
    "7 classes": {"num_classes": 7},
    "1 channel": {"in_chans": 1},
}


@dataclass(frozen=True)
class Asked(Checked):
    """What the first match names for each variant, and how long the look-up took."""

    parameters: int = 0
    names: tuple[tuple[str, tuple[str, ...]], ...] = ()
    seconds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Ranked(Checked):
    """Whether the original is among the closest three, for each way of changing it."""

    hits: tuple[tuple[str, bool], ...] = ()


def ask(architecture: str) -> Asked:
    adapter, name = plugins.resolve(architecture)
    names, seconds, parameters = [], [], 0
    for variant, kwargs in VARIANTS.items():
        try:
            with no_initialisation():
                model = build_skeleton(adapter, name, kwargs)
        except ArchitectureError:
            if not kwargs:
                raise
            continue  # it takes no such argument
        shapes = state_dict_shapes(model)
        parameters = parameters or sum(parameter.numel() for parameter in model.parameters())
        by_label = {variant: shapes}
        if not kwargs:
            by_label["under model."] = {f"model.{key}": shape for key, shape in shapes.items()}
        for label, tensors in by_label.items():
            started = time.perf_counter()
            match = next(load_shipped_index().find_matches(tensors), None)
            seconds.append(time.perf_counter() - started)
            names.append((label, match.architectures if match else ()))
    return Asked(architecture, "", parameters, tuple(names), tuple(seconds))


def rank(architecture: str) -> Ranked:
    adapter, name = plugins.resolve(architecture)
    with no_initialisation():
        shapes = state_dict_shapes(build_skeleton(adapter, name, {}))
        same = next(load_shipped_index().find_matches(shapes)).architectures  # no digest tells these apart
        changed = {"a block renamed": block_renamed(shapes), "a layer added": layer_added(shapes)}
        named = {
            how: {close.architecture for close in find_closest_architectures(changed_shapes)}
            for how, changed_shapes in changed.items()
        }
    return Ranked(architecture, hits=tuple((how, not names.isdisjoint(same)) for how, names in named.items()))


def block_renamed(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The innermost module around the middle tensor that holds at least five."""
    block = list(shapes)[len(shapes) // 2]
    while block.count(".") and sum(key.startswith(f"{block}.") for key in shapes) < 5:
        block = block.rpartition(".")[0]
    return {
        f"{block}.inner{key[len(block) :]}" if key.startswith(f"{block}.") else key: s
        for key, s in shapes.items()
    }


def layer_added(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {**shapes, "neck.conv.weight": (64, 64, 3, 3), "neck.conv.bias": (64,)}


def count_answers(results: list[Asked], variant: str) -> str:
    answers = {
        result.architecture: names for result in results for label, names in result.names if label == variant
    }
    unique = sum(names == (architecture,) for architecture, names in answers.items())
    right = sum(architecture in names for architecture, names in answers.items())
    groups = len(set(answers.values()))
    return (
        f"{variant}: {len(answers)} asked, {unique} named alone, {right} in the right group, {groups} groups"
    )


def count_functions(results: list[Asked]) -> str:
    """How many are told apart down to one function, and down to one function and input."""
    groups = {
        names for result in results for label, names in result.names if label == "as built" and len(names) > 1
    }
    looked_up = {result.architecture for result in results}
    recognised = sum(
        names == (result.architecture,)
        for result in results
        for label, names in result.names
        if label == "as built"
    )
    for names in tqdm(sorted(groups), unit="group", file=sys.stderr):
        adapter, name = plugins.resolve(names[0])
        tensors = build_skeleton(adapter, name, {}).state_dict()
        distinct = merge_equivalent_candidates(
            Checkpoint(Path("model.pt"), "", tensors), list(map(candidate, names))
        )
        for candidate_of_one in distinct:
            print(
                "  "
                + " = ".join(candidate_of_one.names)
                + ("" if len(distinct) == 1 else "  (one of several)")
            )
        recognised += sum(name in looked_up for name in names) if len(distinct) == 1 else 0
    return (
        f"as built, twins of one function taken as one: {recognised} of {len(results)} "
        "recognised without data"
    )


def candidate(architecture: str) -> Candidate:
    adapter, recipe = recipe_without_arguments(architecture)
    model = build_skeleton(adapter, recipe.name, {})
    return replace(
        Candidate(adapter, recipe, "shapes"), input_spec=adapter.input_spec(model, recipe.name, {})
    )


def save_and_load(architecture: str, folder: Path) -> str:
    """Return how a saved file of random weights is recognised; "wrong…" if it is not."""
    adapter, name = plugins.resolve(architecture)
    path = folder / "model.pt"
    torch.save(adapter.build(name, {}).state_dict(), path)
    try:
        loaded = ckpt_tools.load(path)
    except AmbiguousArchitecture as error:
        return "in the right group" if architecture in str(error) else f"wrong group: {error}"
    right = architecture in (loaded.recipe.architecture, *loaded.twins)
    return "told" if right else f"wrong: {loaded.recipe.architecture}"


def save_and_load_all(names: Iterable[str]) -> None:
    answers: Counter[str] = Counter()
    for name in tqdm(list(names), unit="model", file=sys.stderr):
        with tempfile.TemporaryDirectory() as folder:
            try:
                answer = save_and_load(name, Path(folder))
            except Exception as error:
                answer = f"wrong: {brief(error)}"
        if answer.startswith("wrong"):
            print(f"  {name}: {answer}")
        answers[answer.partition(":")[0]] += 1
    print("saved and loaded: " + ", ".join(f"{count} {answer}" for answer, count in answers.most_common()))


def draw_sample(
    results: list[Asked], count: int, largest: int, keep: Callable[[Asked], bool] = bool
) -> list[str]:
    pool = sorted(result.architecture for result in results if result.parameters <= largest and keep(result))
    return random.Random(0).sample(pool, min(count, len(pool)))


@click.command(help=__doc__)
@click.option("--only", default="*", metavar="PATTERN", help="Names such as 'timm:resnet*'.")
@click.option("--jobs", default=2, show_default=True)
@click.option("--closest", "close", default=0, metavar="N", help="Also change N models drawn at random.")
@click.option("--twins", is_flag=True, help="Also run colliding architectures against each other.")
@click.option("--saved", "files", default=0, metavar="N", help="Also save and load N models drawn at random.")
def main(only: str, jobs: int, close: int, twins: bool, files: int) -> None:
    warnings.simplefilter("ignore")
    next(
        load_shipped_index().find_matches(state_dict_shapes(nn.Linear(1, 1))), None
    )  # read once, before the processes part
    everything: list[Asked] = check_all(ask, list(architectures(only)), jobs, None)
    failures = [result for result in everything if result.failure]
    results = [result for result in everything if not result.failure and result.parameters <= LARGEST]
    for result in failures:
        print(f"FAILED {result.architecture}: {result.failure}")
    print(
        f"{len(results)} models up to {LARGEST:,} parameters, "
        f"{len(everything) - len(results) - len(failures)} larger"
    )
    for variant in ("as built", "7 classes", "1 channel", "under model."):
        print(count_answers(results, variant))
    seconds = sorted(second for result in results for second in result.seconds)
    worst = [seconds[len(seconds) // 2], seconds[int(0.99 * len(seconds))], seconds[-1]]
    print(
        "look-up: median {:.1f} ms, 99th percentile {:.1f} ms, longest {:.1f} ms".format(
            *(1000 * s for s in worst)
        )
    )
    if close:
        ranked: list[Ranked] = check_all(rank, draw_sample(results, close, LARGEST), jobs, None)
        ranks = Counter(how for result in ranked for how, hit in result.hits if hit)
        print(
            f"among the closest three, of {len(ranked)}: "
            + ", ".join(f"{how} {n}" for how, n in ranks.items())
        )
    if twins:
        print(count_functions(results))
    if files:
        save_and_load_all(draw_sample(results, files, SMALL))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(prog_name="scripts/run recognise")
