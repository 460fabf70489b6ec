"""``ckpt-fix demo``: the effect in a minute, on data that comes with the package."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt_tools.cli import options
from ckpt_tools.cli.bn_reestimate_command import bn_reestimate
from ckpt_tools.cli.diff_command import diff
from ckpt_tools.cli.printing import print_json, print_result
from ckpt_tools.cli.progress import progress_bar

if TYPE_CHECKING:
    from ckpt_tools.demo.train import DemoResult

_ARCHITECTURE = "ckpt_tools.demo.densenet:digits_densenet"


@click.command()
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Networks to train.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep checkpoints and data in this folder.",
)
@options.as_json
def demo(seeds: int, keep: Path | None, as_json: bool) -> None:
    """Train a small DenseNet with dropout on 600 digits and correct its checkpoint, with and without data.

    All are scored on 1,197 other digits. The commands shown are really run; repeat them on the
    files that --keep leaves.
    """
    from ckpt_tools.report.text.demo_text import demo_text

    results = []
    with _folder(keep) as folder:
        for seed in range(seeds):
            results.append(_train_and_correct(seed, folder, quiet=as_json or seed > 0))
    if as_json:
        print_json({"seeds": [dataclasses.asdict(result) for result in results]})
    else:
        print_result(demo_text(results))


def _train_and_correct(seed: int, folder: Path, *, quiet: bool) -> DemoResult:
    """Train a network, correct its checkpoint with and without data, and score all on the test images."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from ckpt_tools.demo.densenet import digits_densenet
    from ckpt_tools.demo.digits import load_digits
    from ckpt_tools.demo.train import DROP_RATE, EPOCHS, DemoResult, Score, score, train
    from ckpt_tools.storage.output.atomic_write import write_atomically

    digits = load_digits(seed)
    with progress_bar(f"training network {seed}", EPOCHS, unit="epoch", leave=False) as bar:

        def show_epoch(epochs: int, _: int) -> None:
            bar.update(epochs - bar.n)

        model = train(digits, seed=seed, progress=show_epoch)
    source = folder / f"digits-{seed}.pt"
    data = source.with_suffix(".npy")
    with_data, without_data = (source.with_suffix(f".{name}.safetensors") for name in ("bn", "no-data"))
    # Through temporary files, so that a link of such a name in the folder is replaced and not
    # followed.
    with write_atomically(source, overwrite=True) as temporary:
        torch.save(model.state_dict(), temporary)
    with write_atomically(data, overwrite=True) as temporary, temporary.open("wb") as file:
        np.save(file, digits.train_images.numpy())
    model_options = ["--arch", _ARCHITECTURE, "--model-kwargs", f"drop_rate={DROP_RATE}"]
    common = [str(source), *model_options, "--overwrite", "--quiet"]
    _run_command(bn_reestimate, [*common, "--data", str(data)], quiet=quiet)
    _run_command(diff, [str(source), str(with_data)], quiet=quiet)
    shape = ",".join(map(str, digits.train_images.shape[1:]))
    # The digits are normalised, so the inputs that stand for them are, too.
    alone = ["--input-size", shape, "--mean", "0.45", "--std", "0.25", "-o", str(without_data)]
    _run_command(bn_reestimate, [*common, *alone], quiet=quiet)

    def score_file(file: Path) -> Score:
        corrected = digits_densenet()
        corrected.load_state_dict(load_file(file))
        return score(corrected, digits.test_images, digits.test_labels)

    before = score(model, digits.test_images, digits.test_labels)
    return DemoResult(before, score_file(with_data), score_file(without_data))


def _run_command(command: click.Command, arguments: list[str], *, quiet: bool) -> None:
    if quiet:
        with contextlib.redirect_stdout(io.StringIO()):
            command.main(arguments, standalone_mode=False)
        return
    print_result(f"$ ckpt-fix {command.name} {' '.join(arguments)}")
    command.main(arguments, standalone_mode=False)
    print_result("")


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="ckpt-fix-demo-") as folder:
        yield Path(folder)
