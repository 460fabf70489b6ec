"""``ckpt-fix evaluate``: how good a checkpoint is on labelled data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckpt_tools.cli import github, options
from ckpt_tools.cli.printing import print_json, print_result, redirect_foreign_stdout
from ckpt_tools.cli.progress import EvaluationBar
from ckpt_tools.machine.heap import keep_freed_memory
from ckpt_tools.redaction import without_secrets

if TYPE_CHECKING:  # it imports torch
    from ckpt_tools.jobs.evaluation import EvaluationRequest


@click.command()
@click.argument("checkpoint", type=options.path)
@click.option(
    "--data",
    required=True,
    metavar="SPEC",
    help="Labelled data: a folder with a subfolder of images for every class, or with --labels, an "
    ".npz/.pt/.safetensors file with images and labels, WebDataset shards with .cls members, the "
    "URL of one of these (s3:// gs:// hf:// http://), cifar10:DIR, cifar100:DIR, svhn:DIR, "
    "mnist:DIR (their test split), or package.module:callable that yields (inputs, labels) or "
    "dicts with labels, also a Lightning DataModule (your code is imported and run).",
)
@click.option("--before", type=options.path, metavar="OTHER", help="A second checkpoint, to compare with.")
@options.evaluation
@options.model
@options.reading
@options.preprocessing
@options.pack("request", "ckpt_tools.jobs.evaluation", "EvaluationRequest")
@options.as_json
@options.quiet
def evaluate(request: EvaluationRequest, as_json: bool, quiet: bool) -> None:
    """Error, NLL and calibration of CHECKPOINT on labelled data, with standard errors.

    Nothing is written. Top-1 and top-5 error in percent, NLL in nats an image, expected calibration
    error (ECE, 15 bins) in percent. With --before both checkpoints see the same images, and the
    change carries a paired standard error. A gate that is not passed ends with exit code 4, after
    the table.

    \b
        ckpt-fix evaluate model.pt --data val/
        ckpt-fix evaluate model.bn.safetensors --before model.pt --data val/ --gate 'error <= before + 0.1'
    """
    from ckpt_tools.evaluate.scores import refuse_failed_gate
    from ckpt_tools.jobs.evaluation import execute_evaluation, prepare_evaluation
    from ckpt_tools.report.records.reestimation_json import evaluation_json
    from ckpt_tools.report.text.metrics_text import evaluation_plan_text, metrics_text

    with redirect_foreign_stdout():
        plan = prepare_evaluation(request)
    if not as_json:
        print_result(evaluation_plan_text(plan) + "\n")
    with EvaluationBar(plan.images, hidden=quiet) as bar, redirect_foreign_stdout(), keep_freed_memory():
        outcome = execute_evaluation(plan, bar)
    facts = without_secrets(evaluation_json(outcome))
    if as_json:
        print_json(facts)
    else:
        print_result(metrics_text(outcome.metrics))
    github.report_evaluation(facts)
    refuse_failed_gate(outcome.metrics)
