"""``ckpt-fix diff``: the proof that only the expected tensors differ."""

from __future__ import annotations

import click

from ckpt_tools.cli import options
from ckpt_tools.cli.printing import print_json, print_result, redirect_foreign_stdout
from ckpt_tools.errors import CheckFailed
from ckpt_tools.location import Location
from ckpt_tools.plain_text import one_line


@click.command()
@click.argument("before", type=options.path)
@click.argument("after", type=options.path)
@click.option(
    "--expect",
    type=click.Choice(["auto", "variance", "mean+variance", "init", "nothing", "any"]),
    default="auto",
    show_default=True,
    help="What may differ: values of running_var; of running_mean too; the weights that AFTER, "
    "an output of init-rewrite, lists as rewritten, and biases that became 0; nothing; anything. "
    "auto: what AFTER says of itself, else variance.",
)
@options.weights
@options.as_json
def diff(before: Location, after: Location, expect: str, weights: str, trust: bool, as_json: bool) -> None:
    """Compare two checkpoints bit by bit; exit 4 if anything differs that should not.

    Wrapper prefixes are removed from the keys. Where AFTER is an output of ckpt-fix, the weights of
    BEFORE that it was made from are compared.

    \b
        ckpt-fix diff model.pt model.bn.safetensors
        ckpt-fix diff fresh.pt fresh.init.safetensors --expect init
    """
    from ckpt_tools.report.records.reestimation_json import comparison_json
    from ckpt_tools.report.text.comparison_text import comparison_text
    from ckpt_tools.storage.compare import compare_files

    with redirect_foreign_stdout():
        comparison, expected, violations = compare_files(before, after, expect, weights=weights, trust=trust)
    if as_json:
        print_json(comparison_json(comparison, expected, violations))
    else:
        print_result(comparison_text(comparison, violations))
    if violations:
        names = ", ".join(map(one_line, violations[:3])) + (", …" if len(violations) > 3 else "")
        raise CheckFailed(
            f"{after}: {len(violations)} of its tensors should be as in {before} and are not: {names}."
        )
