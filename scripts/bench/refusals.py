"""How often the check of the data refuses right data, and wrong data, as floats and without hints.

It runs on the nets of ``bench evidence``, whose trainings change the images in seven ways, and on nets
made of them by averaging, merging, fine-tuning and pruning. What the check refuses ends a run of
`pooled`, `exact` or `ema`; `ratio` does not depend on the data, and is what `auto` takes where the
drop rates are known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import ckpt_tools
from bench.evidence.continued_nets import continue_training
from bench.evidence.image_data import ImageData
from bench.evidence.net_training import MOMENTS, Training, list_trainings, load_or_train
from bench.evidence.wrong_images import WRONG_INPUTS
from ckpt_tools.diagnosis.data_check import check_data

IMAGES = 256
RIGHT = "right"
RIGHT_OTHER_WEIGHTS = "right, for weights that were averaged, merged, pruned or tuned with frozen BN"
WRONG_SUBSETS = 2  # of each kind; wrong data is the same from one to the next


def count_refusals(
    scratch: Path, seeds: int, subsets: int, only: str = ""
) -> Iterator[tuple[str, str, Counter[str]]]:
    """Yield for each net and kind of data how many subsets got which verdict.

    Wrong data is for finished nets only. Before, and after an averaging, the statistics themselves
    are not those of the weights.
    """
    for training in list_trainings(seeds):
        if training.data != "digits" or only not in training.file_name:
            continue
        data = training.load_images()
        for kind, model in list_nets(training, scratch):
            name = f"{training.net}, {training.augmentation}, {kind}, seed {training.seed}"
            samples = [draw(data, number) for number in range(subsets)]
            yield (
                name,
                RIGHT if kind in MOMENTS else RIGHT_OTHER_WEIGHTS,
                Counter(_judge(model, data.normalise(raw), number) for number, raw in enumerate(samples)),
            )
            for wrong, make in WRONG_INPUTS.items() if kind == "final" else ():
                yield (
                    name,
                    wrong,
                    Counter(
                        _judge(model, make(data, raw), number)
                        for number, raw in enumerate(samples[:WRONG_SUBSETS])
                    ),
                )


def list_nets(training: Training, scratch: Path) -> Iterator[tuple[str, nn.Module]]:
    """The net at the end and half-way, and what was made of it, by kind."""
    yield from load_or_train(training, scratch).items()
    yield from continue_training(training, scratch).items()


def draw(data: ImageData, number: int) -> Tensor:
    """256 raw images: of the training split for even numbers, held out for odd ones."""
    images = data.test_images if number % 2 else data.train_images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(number))
    return images[order[:IMAGES]]


def _judge(model: torch.nn.Module, batch: Tensor, seed: int) -> str:
    walk = ckpt_tools.walk(model, batch[:4])
    verdict = check_data(
        model, [batch], walk, None, preprocessed=True, rates_known=True, images=IMAGES, seed=seed
    )
    return verdict.verdict
