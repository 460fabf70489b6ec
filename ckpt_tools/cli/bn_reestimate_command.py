"""``ckpt-fix bn-reestimate``: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckpt_tools.cli import github, many_checkpoints, options
from ckpt_tools.cli.error_boundary import interrupt_on_sigterm
from ckpt_tools.cli.printing import print_json, print_result
from ckpt_tools.cli.progress import EvaluationBar, ReestimationBar
from ckpt_tools.cli.torchrun import join_team
from ckpt_tools.location import Location
from ckpt_tools.plain_text import one_line
from ckpt_tools.redaction import without_secrets

if TYPE_CHECKING:  # these import torch
    from ckpt_tools.evaluate.scores import Metrics
    from ckpt_tools.jobs.plan import Plan


@click.command(name="bn-reestimate")
@click.argument("checkpoints", metavar="CHECKPOINT...", nargs=-1, required=True, type=options.path)
@click.option(
    "--data",
    required=True,
    metavar="SPEC",
    help="The training data: a folder of images (labels ignored), an .npz/.npy/.pt/.safetensors array, WebDataset "
    "shards (one .tar, a folder of them, 'train-{000..146}.tar', 'train-*.tar'), cifar10:DIR, cifar100:DIR, svhn:DIR, "
    "mnist:DIR, package.module:callable (your code is imported and run), or the URL of a folder, array or shards: "
    "s3:// gs:// hf:// http://.",
)
@click.option(
    "-o",
    "--output",
    type=options.path,
    help="A file or a URL. Default: NAME.bn.safetensors beside the checkpoint, in the current folder for http:// and "
    "hf://.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@many_checkpoints.options
@options.architecture
@options.checkpoint
@click.option(
    "--layers",
    type=click.Choice(["auto", "downstream", "all"]),
    default="auto",
    show_default=True,
    help="Which BN layers to rewrite. auto: those behind active dropout, or all where no drop rate is recorded.",
)
@click.option(
    "--estimator",
    type=click.Choice(["pooled", "exact", "ema"]),
    default="pooled",
    show_default=True,
    help="pooled: one pass. exact: passes until every variance is that of the final network. ema: as in the paper.",
)
@click.option(
    "--statistics",
    type=click.Choice(["variance", "mean+variance"]),
    default="variance",
    show_default=True,
    help="mean+variance is precise BN and rewrites running means, too.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Stop when every layer's 95th-percentile relative standard error is below it.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Read this many samples, drawn at random.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of the random order of the samples.",
)
@click.option("--momentum", default=0.1, show_default=True, help="Of the ema estimator.")
@click.option("--epochs", type=click.IntRange(min=1), default=1, show_default=True, help="Of the ema estimator.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "tf32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of convolutions and matrix products; the deviation from fp32 is measured and shown. tf32: CUDA only.",
)
@click.option(
    "--keep-outliers",
    is_flag=True,
    help="Let samples count that stand out from all others (100 times too large, one colour all over). By default they "
    "are left out and named with their leverage. NaN and infinity never count; in over 1 % of the samples they are an "
    "error.",
)
@click.option("--compile", is_flag=True, help="Run what stands between BN layers through torch.compile.")
@click.option(
    "--deterministic",
    is_flag=True,
    help="On CUDA, take only kernels that give the same bits every time (slower). On CPUs that is so by itself.",
)
@options.running
@options.preprocessing
@click.option(
    "--eval-data",
    metavar="SPEC",
    help="Labelled data (as for ckpt-fix evaluate) to judge the model on, before and after. It decides the gate "
    "and nothing else.",
)
@options.evaluation
@click.option("--force", is_flag=True, help="Go on although control layers disagree with the data.")
@options.reports
@options.as_json
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def bn_reestimate(
    checkpoints: tuple[Location, ...],
    model_kwargs: tuple[str, ...],
    reports: tuple[Location, ...],
    as_json: bool,
    quiet: bool,
    **said: Any,
) -> None:
    """Rewrite the BN running variances of CHECKPOINT with dropout off.

    The training data streams through the model once; a new safetensors file is written in which only running
    variances differ. CHECKPOINT itself is never changed. Without recorded drop rates every BN layer is rewritten.

    \b
        ckpt-fix bn-reestimate model.pt --data train/ --arch torchvision:densenet121
        ckpt-fix bn-reestimate model.pt --data train/ --arch timm:resnet50 --model-kwargs drop_path_rate=0.1
        ckpt-fix bn-reestimate model.pt --data train/ --eval-data val/ --gate 'error <= before + 0.1'

    Several checkpoints, patterns and folders, searched to the bottom, make one run: those with the same preprocessing
    share one stream of images, a manifest records each outcome, one failure stops no other (exit code 1 at the end,
    4 if only checks and gates said no), and a second run skips what is done and proves to be whole.

    \b
        ckpt-fix bn-reestimate runs/ --data train/ --output-dir fixed/ --exclude 'last*'

    On a cluster, every checkpoint or group of them as a task: --engine ray (extra `ray`), on a file system that all
    nodes share. A task whose worker is lost is started again.

    \b
        ckpt-fix bn-reestimate runs/ --data train/ --output-dir fixed/ --engine ray --ray-address 10.0.0.1:6379

    Every path may be a URL of a store that fsspec knows, with credentials from the environment:

    \b
        ckpt-fix bn-reestimate s3://bucket/model.pt --data s3://bucket/train/

    On several devices: torchrun --nproc-per-node 8 --no-python ckpt-fix bn-reestimate … Every process takes its share
    of the batches and, of GPUs, its own; the result is that of one process.
    """
    from ckpt_tools.evaluate.scores import GateFailed
    from ckpt_tools.identify.model_kwargs import parse_model_kwargs
    from ckpt_tools.jobs.plan import prepare_reestimation
    from ckpt_tools.jobs.reestimation import execute_reestimation
    from ckpt_tools.jobs.request import Request
    from ckpt_tools.report.records.reestimation_json import outcome_json
    from ckpt_tools.report.report_files import check_reports, write_report
    from ckpt_tools.report.text.reestimation_text import outcome_text, plan_text

    preprocessing = options.pop_preprocessing(said)
    place = many_checkpoints.pop_folder_options(said)
    first = checkpoints[0]
    request = Request(first, model_kwargs=parse_model_kwargs(model_kwargs), preprocessing=preprocessing, **said)
    if many_checkpoints.is_folder_run(checkpoints, place):
        many_checkpoints.reestimate_checkpoints(checkpoints, request, place, reports, as_json=as_json, quiet=quiet)
        return
    check_reports(reports, (*many_checkpoints.input_files(request, [first]), request.output))
    with join_team(request.device) as team:
        with options.redirect_foreign_stdout():
            plan = prepare_reestimation(request, team=team)
        if not as_json and team.speaks:
            print_result(plan_text(plan) + "\n")
        hidden = quiet or not team.speaks
        bars = ReestimationBar(plan.stream.count, hidden=hidden), EvaluationBar(plan.labelled_images, hidden=hidden)
        try:
            with bars[0], bars[1], options.redirect_foreign_stdout(), interrupt_on_sigterm():
                outcome = execute_reestimation(plan, *bars)
        except GateFailed as failed:
            if team.speaks:
                _show_refusal(plan, failed.metrics, as_json)
            raise
        if not team.speaks:
            return
        facts = without_secrets(outcome_json(outcome))
        for report in reports:
            write_report(report, facts)
        if as_json:
            print_json(facts)
        else:
            print_result(outcome_text(outcome))
            print_result("".join(f"report: {one_line(report)}\n" for report in reports), end="")
        github.report_reestimation(facts)


def _show_refusal(plan: Plan, metrics: Metrics, as_json: bool) -> None:
    """What the gate saw, here and in the summary of a CI job."""
    from ckpt_tools.report.records.reestimation_json import refusal_json
    from ckpt_tools.report.text.metrics_text import metrics_text

    facts = without_secrets(refusal_json(plan, metrics))
    if as_json:
        print_json(facts)
    else:
        print_result(metrics_text(metrics))
    github.report_evaluation(facts)
