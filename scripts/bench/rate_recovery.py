"""Train small nets at known drop rates, and read the rates back from their stored statistics.

Three nets with dropout, dropout inside residual blocks and DropPath, trained on the digits at five
rates, with and without augmentation. The rates are fitted on plain images, as people feed them. It
takes half an hour on one core. What is recorded is skipped, so that a run can be started again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import torch
from torch import nn

import ckpt_tools
from bench.evidence.net_training import Training, load_or_train
from bench.evidence.small_nets import SmallNet
from ckpt_tools.diagnosis.rate_fit import BATCH_SIZE, SAMPLES, RateFit, fit_rates

RESULTS = Path(__file__).parent / "results" / "drop_rates.json"
SCRATCH = Path(tempfile.gettempdir()) / "ckpt-tools-drop-rates"

NETS = ("densenet", "wrn", "resnet-droppath")
RATES = (0.0, 0.1, 0.2, 0.3, 0.5)
TOLERANCES = {"none": 0.03, "shift and zoom": 0.07}  # by augmentation: the largest error that passes
NEEDED_SHARE = 0.9  # of the nets
_ROUNDING = 1e-9  # 0.3 - 0.27 is a little more than 0.03


@dataclass(frozen=True)
class TrainingAtRate(Training):
    """A training of a small net at another drop rate than its own."""

    drop_rate: float

    @property
    def small_net(self) -> SmallNet:
        return replace(super().small_net, drop_rate=self.drop_rate)

    @property
    def file_name(self) -> str:
        return f"rate{self.drop_rate}-{super().file_name}"


@dataclass(frozen=True)
class Recovery:
    """A true rate and what its net's statistics say, with the standard error of the estimate.

    ``is_clear`` is whether the estimate would be used; otherwise the rate counts as unknown.
    """

    net: str
    augmentation: str
    truth: float
    seed: int
    estimate: float
    error: float
    is_clear: bool

    @property
    def key(self) -> tuple[str, str, float, int]:
        return self.net, self.augmentation, self.truth, self.seed

    @property
    def is_close(self) -> bool:
        return abs(self.estimate - self.truth) <= TOLERANCES[self.augmentation] + _ROUNDING


@dataclass(frozen=True)
class Bar:
    """How many nets are as close to the truth as they have to be."""

    close: int
    count: int

    @property
    def is_passed(self) -> bool:
        return self.close >= NEEDED_SHARE * self.count

    def __str__(self) -> str:
        share = f" ({100 * self.close / self.count:.0f} %)" if self.count else ""
        return f"{self.close} of {self.count}{share}"


@click.command(help=__doc__)
@click.option("--seeds", default=2, show_default=True)
@click.option("--only", default="", help="Nets whose file name contains this, as in rate0.2 or wrn.")
@click.option("--again", is_flag=True, help="Fit what is recorded anew, as after a change to the fit.")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    default=SCRATCH,
    show_default=True,
    help="Folder of trained nets. Empty it after a change to the nets or to their training.",
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="File of records.")
@click.option("--summary", is_flag=True, help="Only print what is stored.")
def main(seeds: int, only: str, again: bool, scratch: Path, out: Path, summary: bool) -> None:
    torch.set_num_threads(1)
    if not summary:
        trainings = [training for training in list_trainings(seeds) if only in training.file_name]
        measure_trainings(trainings, scratch, out, again=again)
    print(render_report(read_recoveries(out)))


def list_trainings(seeds: int) -> Iterator[TrainingAtRate]:
    """All trainings of the first seed come first, so that an unfinished run has every rate."""
    for seed in range(seeds):
        for rate in RATES:
            for augmentation in TOLERANCES:
                for net in NETS:
                    yield TrainingAtRate("digits", net, augmentation, seed, rate)


def measure_trainings(
    trainings: Iterable[TrainingAtRate], scratch: Path, out: Path, *, again: bool = False
) -> None:
    """Fit the rates of the nets that the file of records lacks; it is replaced after each of them."""
    for training in trainings:
        recoveries = {recovery.key: recovery for recovery in read_recoveries(out)}
        key = (training.net, training.augmentation, training.drop_rate, training.seed)
        if key in recoveries and not again:
            continue
        started = time.perf_counter()
        recovery = recover_rate(training, scratch)
        recoveries[recovery.key] = recovery
        write_recoveries(out, recoveries.values())
        seconds = time.perf_counter() - started
        print(f"{training.file_name}: {_format_estimate(recovery)}, {seconds:.1f} s", flush=True)


def recover_rate(training: TrainingAtRate, scratch: Path) -> Recovery:
    """Fit the drop rate of a trained net, of which only the state dict is known, on plain images."""
    state = load_or_train(training, scratch)["final"].state_dict()
    fit = fit_training(training, state)
    if fit is None:
        raise RuntimeError(f"{training.file_name}: no drop rate can be fitted")
    ((estimate, error),) = zip(fit.rates.values(), fit.errors.values(), strict=True)
    return Recovery(
        training.net,
        training.augmentation,
        training.drop_rate,
        training.seed,
        round(estimate, 4),
        round(error, 4),
        fit.is_clear,
    )


def fit_training(training: TrainingAtRate, state: Mapping[str, torch.Tensor]) -> RateFit | None:
    def make_model(rates: Mapping[str, float]) -> nn.Module:
        model = replace(training, drop_rate=rates["drop_rate"]).build()
        model.load_state_dict(state)
        return model.eval()

    data = training.load_images()
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(training.seed))
    images = data.normalise(data.train_images[order[:SAMPLES]])
    # At a rate above zero, which shows where dropout acts.
    model_walk = ckpt_tools.walk(make_model({"drop_rate": max(RATES)}), images[:BATCH_SIZE])
    return fit_rates(make_model, ["drop_rate"], list(images.split(BATCH_SIZE)), model_walk)


def read_recoveries(file: Path) -> list[Recovery]:
    """All records of a file; without a file there are none."""
    if not file.exists():
        return []
    return [Recovery(**record) for record in json.loads(file.read_text(encoding="utf-8"))["nets"]]


def write_recoveries(file: Path, recoveries: Iterable[Recovery]) -> None:
    """Replace the file, one line for each net. An interruption leaves the old file or the new one."""
    ordered = sorted(recoveries, key=lambda recovery: recovery.key)
    lines = ",\n".join(json.dumps(asdict(recovery)) for recovery in ordered)
    header = f'"torch": {json.dumps(torch.__version__)},\n"samples": {SAMPLES},\n'
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(f'{{\n{header}"nets": [\n{lines}\n]\n}}\n', encoding="utf-8")
    temporary.replace(file)


def judge(recoveries: Sequence[Recovery]) -> Bar:
    """Count the close ones among nets that were all trained with the same augmentation."""
    return Bar(sum(recovery.is_close for recovery in recoveries), len(recoveries))


def render_report(recoveries: Sequence[Recovery]) -> str:
    """A Markdown table of all estimates, and the bars over clear answers and over all."""
    parts = [render_table(recoveries)]
    for augmentation in TOLERANCES:
        group = [recovery for recovery in recoveries if recovery.augmentation == augmentation]
        if group:
            parts.append(_render_bar(augmentation, group))
    return "\n\n".join(parts)


def render_table(recoveries: Iterable[Recovery]) -> str:
    rows: dict[tuple[str, str, float], dict[int, Recovery]] = {}
    for recovery in sorted(recoveries, key=lambda recovery: recovery.key):
        row = (recovery.net, recovery.augmentation, recovery.truth)
        rows.setdefault(row, {})[recovery.seed] = recovery
    seeds = sorted({seed for row in rows.values() for seed in row})
    titles = "".join(f" seed {seed} |" for seed in seeds)
    lines = [f"| net | training | rate |{titles}", "|---" * (3 + len(seeds)) + "|"]
    for (net, augmentation, truth), row in rows.items():
        cells = "".join(f" {_format_estimate(row[seed]) if seed in row else ''} |" for seed in seeds)
        lines.append(f"| {net} | {augmentation} | {truth} |{cells}")
    return "\n".join(lines)


def _render_bar(augmentation: str, group: Sequence[Recovery]) -> str:
    clear = [recovery for recovery in group if recovery.is_clear]
    bar = judge(clear)
    lines = [
        f"{'passed' if bar.is_passed else 'BROKEN'}: {bar} of the clear answers are within "
        f"{TOLERANCES[augmentation]} of the truth, trained with augmentation {augmentation}",
        f"    {judge(group)} with the unclear ones, of which there are {len(group) - len(clear)}",
    ]
    for net in NETS:
        of_net = [recovery for recovery in group if recovery.net == net]
        clear_of_net = [recovery for recovery in of_net if recovery.is_clear]
        lines.append(f"    {net}: {judge(clear_of_net)} clear, {judge(of_net)} of all")
    return "\n".join(lines)


def _format_estimate(recovery: Recovery) -> str:
    values = f"{recovery.estimate:.3f} ± {recovery.error:.3f}"
    return values if recovery.is_clear else f"unknown ({values})"
