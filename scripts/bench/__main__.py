"""Measure speed, memory and how often the checks are right.

All contestants work in one run, on the same batches, interleaved; ratios of medians are printed.
The figures are kept in scripts/bench/results/.

\b
scripts/run bench passes       the pass against plain forwards, update_bn and fvcore
                               (--device cuda --batch 256 on a GPU)
scripts/run bench sizes        cost against images and batch size
scripts/run bench stopping     --tolerance: time saved, and whether the error bounds hold
scripts/run bench input        decoding and resizing against timm's and torchvision's loaders
scripts/run bench files        writing against cp, start-up, memory of the whole run
scripts/run bench outliers     three bad images among 600: ours, update_bn, fvcore
scripts/run bench folder       many checkpoints in one run against as many single runs
scripts/run bench data-check   false alarms and misses of the check of the training data (hours)
scripts/run bench init         initialisations: signals through six nets, training on the digits
scripts/run bench evidence     the estimators on small trained nets, with and without data (hours)
scripts/run bench ratio        the paired measurement: inputs needed, and whether the error bounds hold
scripts/run bench refusals     how often the check refuses right and wrong data, on the nets of evidence
scripts/run bench rates        drop rates read back from the statistics of small trained nets
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch

from bench import data_check, initialisations, rate_recovery
from bench.evidence import command as evidence
from bench.evidence.command import SCRATCH as NETS_OF_EVIDENCE
from bench.files import peak_memory, start_up, writing
from bench.folder import prepare_files
from bench.folder import race as race_folder
from bench.loaders import alikeness, measure_speed, photographs
from bench.networks import NETWORKS, SMALL
from bench.outliers import BAD, cases, clean_margins, name_outliers, ruin
from bench.paired_errors import (
    COVERAGE_NETS,
    NEEDED_NETS,
    covered_share,
    geometric_mean,
    inputs_needed,
)
from bench.passes import BASE, CONTESTANTS, OURS, race, ratios, summary, table
from bench.photos import photos
from bench.refusals import RIGHT, count_refusals
from bench.stopping import NETS, SIDE, coverage, wall_times

RESULTS = Path(__file__).parent / "results" / "measurements.json"
SCRATCH = Path(tempfile.gettempdir()) / "ckpt-tools-bench"


def keep(section: str, figures: Any) -> None:
    """Put the figures of one section into measurements.json, beside those of the others."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    stored[section] = {"torch": torch.__version__, "figures": figures}
    RESULTS.write_text(json.dumps(stored, ensure_ascii=False, indent=1) + "\n")


def machine(device: str) -> str:
    return (
        torch.cuda.get_device_name(device) if device != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    )


@click.group(help=__doc__)
def main() -> None:
    """Sub-commands share nothing but the file of results."""


@main.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--only", default="", help="Networks whose name contains this; nothing is stored.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--batches", default=2, show_default=True)
@click.option("--batch", type=int, help="Images in a batch.  [default: 32 at 224, 64 at 32]")
@click.option("--no-exact", is_flag=True, help="Leave the errors against the exact estimate out.")
def passes(device: str, only: str, rounds: int, batches: int, batch: int | None, no_exact: bool) -> None:
    """The pass against plain forwards and peers."""
    raced = {}
    for network in NETWORKS.values():
        if only in network.name:
            costs = race(network, device, batches, batch or network.batch, rounds, exact=not no_exact)
            print(table(network, costs), flush=True)
            raced[network.name] = costs
    print(summary(raced))
    if not only:
        figures = {name: [dataclasses.asdict(cost) for cost in costs] for name, costs in raced.items()}
        keep(f"passes on {machine(device)}", figures)


@main.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--most", "longest", default=8000, show_default=True, help="Images of the longest pass.")
def sizes(device: str, rounds: int, longest: int) -> None:
    """Cost against batch size, at the same number of images, and against the number of images."""
    figures = {}
    batches = [(longest // 16 // batch, batch) for batch in (8, 32, 128)]
    longer = [(longest // part // 125, 125) for part in (8, 4, 2, 1)]
    eval_and_ours = [contestant for contestant in CONTESTANTS if contestant.name in (BASE, OURS)]
    for count, batch in (*batches, *longer):
        costs = race(SMALL, device, max(1, count), batch, rounds, exact=False, contestants=eval_and_ours)
        ours = next(cost for cost in costs if cost.contestant == OURS)
        ratio, rate = ratios(costs, BASE)[OURS][0], ours.images / statistics.median(ours.seconds)
        print(
            f"{SMALL.name}, {count} × {batch}: {rate:.1f} images/s, {ratio:.2f} × the eval forward, "
            f"{ours.memory / 1e6:,.0f} MB",
            flush=True,
        )
        figures[f"{count}×{batch}"] = {"images/s": rate, "ratio": ratio, "memory": ours.memory}
    keep(f"sizes on {machine(device)}", figures)


@main.command()
@click.option("--images", default=20_000, show_default=True)
@click.option("--trials", default=200, show_default=True, help="Of the stated errors, for each net; 0: none.")
@click.option(
    "--rounds", default=1, show_default=True, help="Of the whole command on a folder of JPEG files; 0: none."
)
@click.option("--folder", type=click.Path(path_type=Path), default=SCRATCH, show_default=True)
def stopping(images: int, trials: int, rounds: int, folder: Path) -> None:
    """--tolerance: whether the stated errors are right, and what it saves."""
    if trials:
        pixels, labels = photos(images, SIDE, SIDE)
        coverages = {}
        for name in NETS:
            coverages[name] = coverage(name, pixels, labels, 0.05, trials)
            print(f"{name}: {coverages[name]}", flush=True)
        keep("coverage of the stated errors", coverages)
    if rounds:
        times = wall_times(folder, images, rounds)
        for name, runs in times.items():
            ratio = statistics.median(a / b for a, b in zip(times["everything"], runs, strict=True))
            print(f"{name}: {statistics.median(runs):.1f} s, {ratio:.1f} times less than everything")
        keep("stopping", times)


@main.command("input")
@click.option("--images", default=320, show_default=True, help="JPEG files to make.")
@click.option("--rounds", default=5, show_default=True, help="Passes of every loader.")
def input_(images: int, rounds: int) -> None:
    """Decoding and resizing against timm's and torchvision's loaders."""
    alike = alikeness()
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), images)
        keep("input", {"loaders": measure_speed(Path(folder), images, rounds), "difference from PIL": alike})


@main.command()
@click.option(
    "--megabytes", default=(100, 1000), multiple=True, show_default=True, help="Of files that are written."
)
@click.option("--rounds", default=5, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=SCRATCH, show_default=True)
def files(megabytes: tuple[int, ...], rounds: int, folder: Path) -> None:
    """Writing against cp, start-up, memory."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for size in megabytes:
        seconds = figures[f"writing {size} MB"] = writing(folder, size * 10**6, rounds)
        for name in seconds:
            ratio = statistics.median(
                a / b for a, b in zip(seconds[name], seconds["cp and sync"], strict=True)
            )
            print(
                f"{size} MB, {name}: {statistics.median(seconds[name]):.2f} s, {ratio:.2f} × cp and sync",
                flush=True,
            )
    figures["start-up"] = start_up(folder, rounds)
    for name, median in figures["start-up"].items():
        print(f"{name}: {median:.2f} s", flush=True)
    figures["memory"] = peak_memory(folder, (1000, 8000))
    for name, peak in figures["memory"].items():
        print(f"{name}: {peak / 1e6:,.0f} MB resident at most")
    keep("files", figures)


@main.command()
def outliers() -> None:
    """Three bad images among 600, and the margins of clean ones."""
    figures: dict[str, Any] = {}
    for name, model, images, bad in cases():
        figures[name] = {
            "named": name_outliers(model, bad),
            "error (median, worst), null is NaN": ruin(model, images, bad, BAD),
            "the same without the NaN image": ruin(model, images, bad, BAD[:2]),
            "largest margin": clean_margins(model, images),
        }
        print(f"{name}: {figures[name]}", flush=True)
    keep("outliers", figures)


@main.command()
@click.option("--images", default=2000, show_default=True, help="JPEG files.")
@click.option("--each", default=4, show_default=True, help="Checkpoints of each of three architectures.")
@click.option("--rounds", default=1, show_default=True)
@click.option("--scratch", type=click.Path(path_type=Path), default=SCRATCH, show_default=True)
def folder(images: int, each: int, rounds: int, scratch: Path) -> None:
    """Many checkpoints in one run against as many single runs; their outputs must be equal."""
    data, runs = prepare_files(scratch, images, each)
    with tempfile.TemporaryDirectory(dir=scratch) as outputs:
        seconds = race_folder(data, runs, rounds, Path(outputs))
    alone, together = seconds.values()
    ratio = statistics.median(b / a for a, b in zip(alone, together, strict=True))
    print(
        f"{3 * each} single runs {statistics.median(alone):.1f} s, "
        f"one of all {statistics.median(together):.1f} s"
    )
    print(f"{ratio:.2f} of the time; all tensors equal")
    keep(f"folder, {3 * each} checkpoints, {images} images", seconds)


@main.command()
@click.option("--trials", default=200, show_default=True, help="Samples whose error bars are checked.")
@click.option("--samples", default=12, show_default=True, help="Samples whose errors are compared.")
@click.option("--scratch", type=click.Path(path_type=Path), default=NETS_OF_EVIDENCE, show_default=True)
def ratio(trials: int, samples: int, scratch: Path) -> None:
    """Inputs that `pooled` and the paired measurement need for one error, and the latter's error bars."""
    torch.set_num_threads(1)
    needed = {name: inputs_needed(name, scratch, (4, 16), samples) for name in NEEDED_NETS}
    for repeats in (4, 16):
        values = [of_net[repeats] for of_net in needed.values()]
        listed = ", ".join(f"{name} {value:.1f}" for name, value in zip(needed, values, strict=True))
        mean = geometric_mean(values)
        print(f"inputs needed, pooled / shift, {repeats} repeats: {mean:.1f} ({listed})", flush=True)
    covered = {name: covered_share(name, scratch, trials) for name in COVERAGE_NETS}
    print(f"within ±1.96 stated errors, {trials} trials: {covered}")
    keep("ratio", {"needed": needed, "covered": covered, "trials": trials, "samples": samples})


@main.command()
@click.option("--seeds", default=1, show_default=True)
@click.option("--subsets", default=8, show_default=True, help="Of 256 right images, for each net.")
@click.option("--only", default="", help="Trainings whose file name contains this; nothing is stored.")
@click.option("--scratch", type=click.Path(path_type=Path), default=NETS_OF_EVIDENCE, show_default=True)
def refusals(seeds: int, subsets: int, only: str, scratch: Path) -> None:
    """How often the check refuses right and wrong data, on the nets of `bench evidence`."""
    torch.set_num_threads(1)
    totals: dict[str, Counter[str]] = {}
    for net, kind, verdicts in count_refusals(scratch, seeds, subsets, only):
        totals.setdefault(kind, Counter()).update(verdicts)
        is_wrong = verdicts["refuse"] > 0 if kind.startswith(RIGHT) else verdicts["refuse"] < verdicts.total()
        if is_wrong:
            print(f"{net}: {kind}: {dict(verdicts)}", flush=True)
    for kind, verdicts in totals.items():
        print(f"{kind}: {verdicts['refuse']} of {verdicts.total()} refused, {dict(verdicts)}")
    if not only:
        keep("refusals", {kind: dict(verdicts) for kind, verdicts in totals.items()})


main.add_command(data_check.main, "data-check")
main.add_command(initialisations.main, "init")
main.add_command(evidence.main, "evidence")
main.add_command(rate_recovery.main, "rates")

if __name__ == "__main__":
    main(prog_name="scripts/run bench")
