"""Compare initialisations on nets with dropout.

\b
scripts/run bench init signals              Var(z) of every weight layer, six nets, training mode
scripts/run bench init signals --only vgg   one of them
scripts/run bench init digits               training loss of an MLP on the bundled digits
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import click
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from bench.initialisation_rules import autoinit_dropout, he, lsuv, xavier
from ckpt_tools import rewrite_init
from ckpt_tools.demo.digits import load_digits
from ckpt_tools.initialize.verify import measure_signals

LOW, HIGH = 0.5, 2.0  # Var(z) that counts as kept
BATCH_SIZE = 64
LEARNING_RATES = (1e-2, 3e-3, 1e-3, 3e-4)
ACTIVATIONS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "ELU": nn.ELU, "tanh": nn.Tanh, "GELU": nn.GELU}


@dataclass(frozen=True)
class Net:
    """A network of the comparison.

    `copies` is how many times --samples it runs on: vectors are cheap, and few of them say little.
    """

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    copies: int = 1


def mlp(widths: Sequence[int], inputs: int, outputs: int, f: type[nn.Module]) -> nn.Sequential:
    """Dropout with keep 0.5 behind every hidden activation."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), f(), nn.Dropout(0.5)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs)) if outputs else nn.Sequential(*layers[:-2])


NETS = {
    "resnet": Net(
        "ResNet-18 without BN",
        lambda: torchvision.models.resnet18(norm_layer=lambda channels: nn.Identity()),
        (3, 224, 224),
    ),
    "vgg": Net("VGG-16, dropout 0.5", torchvision.models.vgg16, (3, 224, 224)),
    "densenet": Net(
        "DenseNet-121, dropout 0.2", lambda: torchvision.models.densenet121(drop_rate=0.2), (3, 224, 224)
    ),
    "mixer": Net("MLP-Mixer S/32", lambda: timm.create_model("mixer_s32_224"), (3, 224, 224)),
    "vit": Net(
        "ViT block, dropout 0.1",
        lambda: Block(192, 3, mlp_ratio=4, proj_drop=0.1, attn_drop=0.1),
        (197, 192),
        4,
    ),
    "mlp": Net(
        "MLP of 20 layers, keep 0.5", lambda: mlp([500] * 15 + [250] * 5, 500, 0, nn.ReLU), (500,), 32
    ),
}

# Each changes a fresh model, given a batch and a seed; False where it does not apply.
Rule = Callable[[nn.Module, Tensor, int], object]
SIGNAL_RULES: dict[str, Rule] = {
    "the architecture's own": lambda model, batch, seed: None,
    "He": lambda model, batch, seed: he(model),
    "LSUV-like": lambda model, batch, seed: lsuv(model, batch),
    "AutoInit's dropout rule": autoinit_dropout,
    "ours, `paper`": lambda model, batch, seed: rewrite_init(model, batch, seed=seed),
    "ours, `paper`, forward term only": lambda model, batch, seed: rewrite_init(
        model, batch, seed=seed, backward_term="off"
    ),
    "ours, `propagated`": lambda model, batch, seed: rewrite_init(model, batch, seed=seed, rule="propagated"),
}
DIGIT_RULES: dict[str, Rule] = {
    "He": lambda model, batch, seed: he(model),
    "Xavier": lambda model, batch, seed: xavier(model),
    "ours": lambda model, batch, seed: rewrite_init(model, batch, seed=seed),
    "ours, forward term only": lambda model, batch, seed: rewrite_init(
        model, batch, seed=seed, backward_term="off"
    ),
}


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.option(
    "--only", type=click.Choice(list(NETS)), multiple=True, help="These nets; several times for several."
)
@click.option("--seeds", default=3, show_default=True)
@click.option(
    "--samples", default=8, show_default=True, help="Images; tokens take 4 times as many, vectors 32 times."
)
def signals(only: Sequence[str], seeds: int, samples: int) -> None:
    """Show the share of weight layers with 0.5 ≤ Var(z) ≤ 2, and min, median and max of Var(z)."""
    started = time.perf_counter()
    for name in only or NETS:
        net = NETS[name]
        rows = [signal_row(net, title, rule, seeds, samples) for title, rule in SIGNAL_RULES.items()]
        click.echo(f"\n**{net.title}**\n")
        click.echo(table(["initialisation", "layers within 0.5–2", "min Var(z)", "median", "max"], rows))
    click.echo(footer(started))


def signal_row(net: Net, title: str, rule: Rule, seeds: int, samples: int) -> list[str]:
    all_variances: list[float] = []
    for seed in range(seeds):
        seed_variances = variances(net, rule, seed, samples * net.copies)
        if seed_variances is None:
            return [title, "—", "—", "—", "—"]
        all_variances += seed_variances
    numbers = min(all_variances), statistics.median(all_variances), max(all_variances)
    return [title, share(all_variances), *(f"{number:.3g}" for number in numbers)]


def variances(net: Net, rule: Rule, seed: int, samples: int) -> list[float] | None:
    """Return Var(z) of every weight layer, or None where the rule does not apply.

    The rule sees another batch than the one that the variances are measured on.
    """
    torch.manual_seed(seed)
    model = net.build().train()
    if rule(model, torch.randn(samples, *net.shape), seed) is False:
        return None
    torch.manual_seed(1000 + seed)
    signals = measure_signals(model, [torch.randn(samples, *net.shape)], seed=seed)
    return [layer.variance for layer in signals]


def share(variances_of_layers: Sequence[float]) -> str:
    """How many variances were kept; NaN and infinity were not."""
    within = sum(LOW <= variance <= HIGH for variance in variances_of_layers)
    return f"{100 * within / len(variances_of_layers):.1f} % ({within}/{len(variances_of_layers)})"


@dataclass(frozen=True)
class Trained:
    """Training NLL in nats an image: ``noisy`` with dropout on, over the last epoch's batches as
    they were trained on; ``quiet`` in evaluation mode after it, over all training images."""

    noisy: float
    quiet: float


@main.command()
@click.option("--epochs", default=20, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option(
    "--rate",
    "rates",
    type=float,
    default=LEARNING_RATES,
    multiple=True,
    help="Learning rates to choose from.",
)
def digits(epochs: int, seeds: int, rates: Sequence[float]) -> None:
    """Train 7 hidden layers of 128 (keep 0.5, Adam) on all 1,797 digits.

    The training NLL is shown at each contestant's best learning rate.
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    images, labels = all_digits()
    rows = []
    for activation, f in ACTIVATIONS.items():
        for title, rule in DIGIT_RULES.items():
            runs = {
                rate: [train(f, rule, images, labels, rate, epochs, seed) for seed in range(seeds)]
                for rate in rates
            }
            rows.append([activation, title, *best(runs, "noisy"), *best(runs, "quiet")])
    head = ["activation", "initialisation", "NLL, dropout on", "rate", "NLL, dropout off", "rate"]
    click.echo(table(head, rows))
    click.echo(footer(started))


def all_digits() -> tuple[Tensor, Tensor]:
    splits = load_digits(0)
    images = torch.cat([splits.train_images, splits.test_images])
    return images.flatten(1), torch.cat([splits.train_labels, splits.test_labels])


def train(
    f: type[nn.Module], rule: Rule, images: Tensor, labels: Tensor, rate: float, epochs: int, seed: int
) -> Trained:
    torch.manual_seed(seed)
    model = mlp([128] * 7, 64, 10, f)
    rule(model, images[:2], seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the same dropout masks whatever the initialisation drew
    for _ in range(epochs):
        losses = 0.0
        for chosen in torch.randperm(len(images), generator=order).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            losses += float(loss.detach()) * len(chosen)
    with torch.no_grad():
        quiet = F.cross_entropy(model.eval()(images), labels)
    return Trained(losses / len(images), float(quiet))


def best(runs: dict[float, list[Trained]], mode: str) -> tuple[str, str]:
    """Return the least mean over the learning rates with its standard error, and its rate."""
    scores = {rate: [getattr(run, mode) for run in done] for rate, done in runs.items()}
    rate = min(scores, key=lambda rate: statistics.mean(scores[rate]))
    losses = scores[rate]
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return f"{statistics.mean(losses):.3f} ± {error:.3f}", f"{rate:g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, with columns that also line up in a terminal."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def footer(started: float) -> str:
    return (
        f"\n{time.perf_counter() - started:.0f} s, torch {torch.__version__}, "
        f"{torch.get_num_threads()} thread(s)"
    )
