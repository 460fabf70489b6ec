"""``ckpt-fix bn-reestimate``: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import click

from ckpt_tools.cli import github, many_checkpoints, options
from ckpt_tools.cli.error_boundary import interrupt_on_sigterm
from ckpt_tools.cli.printing import print_json, print_result, redirect_foreign_stdout
from ckpt_tools.cli.progress import EvaluationBar, ReestimationBar
from ckpt_tools.cli.torchrun import join_team
from ckpt_tools.contract import Estimator, LayerChoice, Precision, Statistics
from ckpt_tools.location import Location
from ckpt_tools.machine.heap import keep_freed_memory
from ckpt_tools.method import Method
from ckpt_tools.plain_text import one_line
from ckpt_tools.redaction import without_secrets

if TYPE_CHECKING:  # these import torch
    from ckpt_tools.data.preprocessing import Preprocessing
    from ckpt_tools.evaluate.scores import Metrics
    from ckpt_tools.jobs.plan import Plan
    from ckpt_tools.jobs.reestimation import ReestimationOutcome
    from ckpt_tools.jobs.request import EvaluationOptions, ModelChoice, ReadingOptions, Request

# The defaults are those of Method, so that the command line and Python cannot differ.
_method = options.combine_options(
    options.pack("method", "ckpt_tools.method", "Method"),
    click.option(
        "--layers",
        type=click.Choice(get_args(LayerChoice)),
        default=Method.layers,
        show_default=True,
        help="Which BN layers to rewrite. auto: those behind active dropout, or all where no drop "
        "rate is recorded.",
    ),
    click.option(
        "--only",
        multiple=True,
        metavar="GLOB",
        help="Of these, rewrite only the BN layers with such names, or in such modules (layer4, "
        "'*.bn2'); repeatable.",
    ),
    click.option(
        "--keep",
        multiple=True,
        metavar="GLOB",
        help="Leave the BN layers with such names as they are; repeatable. Layers that the model's "
        "own train() keeps in evaluation mode (frozen) are kept anyway, unless --only names them.",
    ),
    click.option(
        "--estimator",
        type=click.Choice(get_args(Estimator)),
        default=Method.estimator,
        show_default=True,
        help="auto: pooled where the data agrees with the stored statistics, or these trail behind the "
        "weights, else ratio. ratio: the "
        "stored variances, less what dropout added, measured with dropout on and off on the same inputs. "
        "pooled: the variances of the data. exact: passes until every variance is that of the final "
        "network; best for layers that a forward runs on small parts (ghost batches). ema: as the "
        "paper's authors ran it.",
    ),
    click.option(
        "--statistics",
        type=click.Choice(get_args(Statistics)),
        default=Method.statistics,
        show_default=True,
        help="mean+variance is precise BN and rewrites running means, too, whatever is stored.",
    ),
    click.option(
        "--tolerance",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Stop when every layer's 95th-percentile relative standard error is below it.",
    ),
    click.option("--momentum", default=Method.momentum, show_default=True, help="Of the ema estimator."),
    click.option(
        "--epochs",
        type=click.IntRange(min=1),
        default=Method.epochs,
        show_default=True,
        help="Of the ema estimator.",
    ),
    click.option(
        "--precision",
        type=click.Choice(get_args(Precision)),
        default=Method.precision,
        show_default=True,
        help="Of convolutions and matrix products; the deviation from fp32 is measured and shown. "
        "tf32: CUDA only.",
    ),
    click.option(
        "--keep-outliers",
        is_flag=True,
        help="Let samples count that stand out from all others (100 times too large, one colour "
        "all over). By default they are left out and named with their leverage. NaN and infinity "
        "never count; in over 1 % of the samples they are an error.",
    ),
    click.option(
        "--rows-are-samples",
        is_flag=True,
        help="The rows of a batch that package.module:callable yields are independent samples, so that "
        "an outlier is left out alone. Otherwise its batch is left out as a whole.",
    ),
    click.option("--compile", is_flag=True, help="Run what stands between BN layers through torch.compile."),
    click.option("--force", is_flag=True, help="Go on although control layers disagree with the data."),
    click.option(
        "--strict",
        is_flag=True,
        help="Every doubt about the data, and every warning about the result, ends with exit code 4, for CI.",
    ),
)


@click.command(name="bn-reestimate")
@click.argument("checkpoints", metavar="CHECKPOINT...", nargs=-1, required=True, type=options.path)
@click.option(
    "--data",
    metavar="SPEC",
    help="The training data; without it, inputs are made up and the variances compared with dropout on "
    "and off. A folder of images (labels ignored, every format that PIL decodes itself), an "
    ".npz/.npy/.pt/.safetensors array, WebDataset shards (one .tar, a folder of them, "
    "'train-{000..146}.tar', 'train-*.tar'), cifar10:DIR, cifar100:DIR, svhn:DIR, mnist:DIR, "
    "package.module:callable that returns batches, a Dataset, a DataLoader or a Lightning DataModule "
    "(your code is imported and run; train:load for load in ./train.py), or the URL of a folder, array "
    "or shards: s3:// gs:// hf:// http://.",
)
@click.option(
    "-o",
    "--output",
    type=options.path,
    help="A file or a URL. Default: NAME.bn.safetensors beside the checkpoint, in the current "
    "folder for http:// and hf://.",
)
@options.overwrite
@click.option(
    "--again",
    is_flag=True,
    help="Correct a file that bn-reestimate wrote itself. By default it is left alone (exit code 3): "
    "its variances have been corrected once.",
)
@many_checkpoints.options
@options.model
@options.dropout
@_method
@click.option(
    "--deterministic",
    is_flag=True,
    help="On CUDA, take only kernels that give the same bits every time (slower). On CPUs that is "
    "so by itself.",
)
@click.option("--dry-run", is_flag=True, help="Measure and judge everything, but write no checkpoint.")
@options.reading
@options.preprocessing
@click.option(
    "--eval-data",
    metavar="SPEC",
    help="Labelled data (as for ckpt-fix evaluate) to judge the model on, before and after. It "
    "decides the gate and nothing else.",
)
@options.evaluation
@options.reports
@options.as_json
@options.quiet
def bn_reestimate(
    checkpoints: tuple[Location, ...],
    data: str | None,
    output: Location | None,
    overwrite: bool,
    again: bool,
    folder: many_checkpoints.FolderOptions,
    model: ModelChoice,
    method: Method,
    deterministic: bool,
    dry_run: bool,
    reading: ReadingOptions,
    preprocessing: Preprocessing,
    eval_data: str | None,
    evaluation: EvaluationOptions,
    reports: tuple[Location, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Rewrite the BN running variances of CHECKPOINT with dropout off.

    The training data streams through the model once; a new safetensors file is written in which
    only running variances differ. CHECKPOINT itself is never changed. Drop rates that
    nobody recorded are read from the statistics; where that is not clear, every BN layer is rewritten.

    \b
        ckpt-fix bn-reestimate model.pt --data train/ --arch torchvision:densenet121
        ckpt-fix bn-reestimate model.pt --data train/ --arch timm:resnet50 --model-kwargs drop_path_rate=0.1
        ckpt-fix bn-reestimate model.pt --data train/ --eval-data val/ --gate 'error <= before + 0.1'

    Several checkpoints, patterns and folders, searched to the bottom, make one run: those with the
    same preprocessing share one stream of images, a manifest records each outcome, one failure
    stops no other (exit code 1 at the end, 4 if only checks and gates said no), and a second run
    skips what is done and proves to be whole.

    \b
        ckpt-fix bn-reestimate runs/ --data train/ --output-dir fixed/ --exclude 'last*'

    On a cluster, every checkpoint or group of them as a task: --engine ray (extra `ray`), on a file
    system that all nodes share. A task whose worker is lost is started again.

    \b
        ckpt-fix bn-reestimate runs/ --data train/ --engine ray --ray-address 10.0.0.1:6379

    Every path may be a URL of a store that fsspec knows, with credentials from the environment:

    \b
        ckpt-fix bn-reestimate s3://bucket/model.pt --data s3://bucket/train/

    On several devices: torchrun --nproc-per-node 8 --no-python ckpt-fix bn-reestimate … Every
    process takes its share of the batches and, of GPUs, its own; the result is that of one process.
    """
    from ckpt_tools.jobs.request import Request

    request = Request(
        checkpoints[0],
        data,
        output,
        model=model,
        preprocessing=preprocessing,
        method=method,
        reading=reading,
        deterministic=deterministic,
        overwrite=overwrite,
        again=again,
        eval_data=eval_data,
        evaluation=evaluation,
        dry_run=dry_run,
    )
    if many_checkpoints.is_folder_run(checkpoints, folder):
        many_checkpoints.reestimate_checkpoints(
            checkpoints, request, folder, reports, as_json=as_json, quiet=quiet
        )
    else:
        _reestimate_checkpoint(request, reports, as_json=as_json, quiet=quiet)


def _reestimate_checkpoint(
    request: Request, reports: tuple[Location, ...], *, as_json: bool, quiet: bool
) -> None:
    from ckpt_tools.evaluate.scores import GateFailed
    from ckpt_tools.jobs.plan import prepare_reestimation
    from ckpt_tools.jobs.reestimation import execute_reestimation
    from ckpt_tools.report.report_files import check_reports
    from ckpt_tools.report.text.reestimation_text import plan_text

    # Before anything is loaded: a report that cannot be written should not be noticed after hours.
    inputs = many_checkpoints.input_files(request, [request.checkpoint])
    check_reports(reports, (*inputs, request.output))
    # Under torchrun every rank comes here, and rank 0 alone shows and writes what all have found.
    with join_team(request.reading.device) as team, keep_freed_memory():
        with redirect_foreign_stdout():
            plan = prepare_reestimation(request, team=team)
        if not as_json and team.is_main_process:
            print_result(plan_text(plan) + "\n")
        hidden = quiet or not team.is_main_process
        passes_bar = ReestimationBar(plan.stream.count, hidden=hidden)
        evaluation_bar = EvaluationBar(plan.labelled_images, hidden=hidden)
        try:
            with passes_bar, evaluation_bar, redirect_foreign_stdout(), interrupt_on_sigterm():
                outcome = execute_reestimation(plan, passes_bar, evaluation_bar)
        except GateFailed as failed:
            if team.is_main_process:
                _show_refusal(plan, failed.metrics, as_json)
            raise
        if team.is_main_process:
            _show_outcome(outcome, reports, as_json)


def _show_outcome(outcome: ReestimationOutcome, reports: tuple[Location, ...], as_json: bool) -> None:
    from ckpt_tools.report.records.reestimation_json import outcome_json
    from ckpt_tools.report.report_files import write_report
    from ckpt_tools.report.text.reestimation_text import outcome_text

    facts = without_secrets(outcome_json(outcome))
    for report in reports:
        write_report(report, facts)
    if as_json:
        print_json(facts)
    else:
        print_result(outcome_text(outcome))
        for report in reports:
            print_result(f"report: {one_line(report)}")
    github.report_reestimation(facts)


def _show_refusal(plan: Plan, metrics: Metrics, as_json: bool) -> None:
    """Show the metrics that the gate refused, here and in the summary of a CI job."""
    from ckpt_tools.report.records.reestimation_json import refusal_json
    from ckpt_tools.report.text.metrics_text import metrics_text

    facts = without_secrets(refusal_json(plan, metrics))
    if as_json:
        print_json(facts)
    else:
        print_result(metrics_text(metrics))
    github.report_evaluation(facts)
