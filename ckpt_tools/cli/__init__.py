"""The command line ``ckpt-fix``. No module here imports torch before a command runs."""

from __future__ import annotations

import click

from ckpt_tools.cli.bn_reestimate_command import bn_reestimate
from ckpt_tools.cli.convert_command import convert
from ckpt_tools.cli.demo_command import demo
from ckpt_tools.cli.diff_command import diff
from ckpt_tools.cli.error_boundary import ErrorBoundary
from ckpt_tools.cli.evaluate_command import evaluate
from ckpt_tools.cli.init_rewrite_command import init_rewrite
from ckpt_tools.cli.inspect_command import inspect
from ckpt_tools.version import VERSION

__all__ = ["main"]


@click.group(cls=ErrorBoundary, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="ckpt-fix")
def main() -> None:
    """Correct the checkpoints of networks with dropout: weights before training, BatchNorm
    variances after it.

    Dropout changes how signals are spread, which most initialisations do not know. Before training,
    give a fresh model weights that allow for its drop rates and nonlinearities (Hendrycks & Gimpel
    2016, section 2):

    \b
        ckpt-fix init-rewrite --arch timm:vgg16_bn --model-kwargs drop_rate=0.5 -o init.safetensors

    Dropout is on while BatchNorm estimates its running variances and off when they are used. After
    training, run the training data through the model once with dropout off and let only the running
    variances change (section 3):

    \b
        ckpt-fix inspect model.pt
        ckpt-fix bn-reestimate model.pt --data train/

    Checkpoints, data and outputs may be URLs of a store that fsspec knows: s3:// gs:// hf://
    http:// and others.

    Exit codes: 0 done, 1 a failure you can act on, 2 usage, 3 nothing to do, 4 a check said no, 130
    interrupted. In GitHub Actions errors and warnings are annotations, too, and the summary of the
    step tells what was done.
    """


main.add_command(bn_reestimate)
main.add_command(convert)
main.add_command(demo)
main.add_command(diff)
main.add_command(evaluate)
main.add_command(init_rewrite)
main.add_command(inspect)
