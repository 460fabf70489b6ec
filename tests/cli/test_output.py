"""Every printed line passes one gate: no command for a CI runner, no control character, nothing endless."""

from __future__ import annotations

import importlib
import inspect
import io
import itertools
import json
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hostile_facts import filled
from hostile_names import is_command, is_own, lines, names, poisoned
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import ckpt_tools.report
from ckpt_tools.cli import error_boundary, github, main
from ckpt_tools.cli.printing import GuardedStream, guarded_streams, print_json, print_message, print_result
from ckpt_tools.cli.progress import EvaluationBar, ReestimationBar, progress_bar, write_above_bars
from ckpt_tools.plain_text import LONGEST_NAME, LONGEST_VALUE, harmless, one_line, shorten, shorten_message

IN_GITHUB = {"GITHUB_ACTIONS": "true"}


def refused(output: str) -> list[str]:
    """The lines that a terminal or a CI runner must not get."""
    return [line for line in lines(output) if is_command(line) or not line.replace("\t", "").isprintable()]


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environment)


# --- the gate -----------------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(names)
def test_what_passes_the_gate_is_harmless(text: str) -> None:
    shown = harmless(text)
    assert refused(shown) == []
    assert harmless(shown) == shown
    assert shown.count("\n") == text.count("\n")  # our own line breaks stay


@settings(max_examples=300)
@given(st.lists(names, max_size=6))
def test_a_stream_in_pieces_is_the_whole(pieces: list[str]) -> None:
    target = io.StringIO()
    stream = GuardedStream(target, str)
    for piece in pieces:
        assert stream.write(piece) == len(piece)
    assert target.getvalue() == harmless("".join(pieces))


@given(st.text(max_size=10), st.integers(0, 3))
def test_nothing_is_endless(text: str, breaks: int) -> None:
    long = "\n".join([text + "x" * 100_000] * (breaks + 1))
    assert max(map(len, harmless(long).split("\n"))) <= LONGEST_VALUE + 100  # escapes are longer
    assert len(shorten(long)) <= LONGEST_NAME
    assert len(shorten_message(f"a: {long} b")) <= LONGEST_VALUE
    assert "\n" not in one_line(long)
    assert shorten_message("no such file. Check the path.") == "no such file. Check the path."
    assert shorten_message(f"x.pt: {'y' * 10**6} is no name. Check it.").endswith("is no name. Check it.")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_streams_of_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding, write_through=True))
    targets = sys.stdout.buffer, sys.stderr.buffer
    with guarded_streams():
        print_result("漢字 \udcff\n::error::x")
        print_message("漢字 \udcff")
        click.echo("::error::漢字", err=True)
        print_json({"##[x]漢字": "\udcff"})
        assert not hasattr(sys.stdout, "buffer")
    assert not isinstance(sys.stdout, GuardedStream)
    for target in targets:
        assert refused(target.getvalue().decode(encoding)) == []
    assert json.loads(targets[0].getvalue().decode(encoding).split(":error::x\n")[1]) == {
        "##[x]漢字": "\udcff"
    }


def test_libraries_pass_the_gate(capsys: pytest.CaptureFixture[str]) -> None:
    with guarded_streams():
        print(warnings.formatwarning("a\n::error::x\x1b[2J", UserWarning, "x\x07.py", 1), file=sys.stderr)  # noqa: T201
        print("::error::x", end="")  # noqa: T201
        print("", "##[error]", file=sys.stderr, sep="#")  # noqa: T201
    assert refused("".join(capsys.readouterr())) == []


def test_json_keeps_names(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"##[x]": ["::error::\n::a::", "\x1b[2J", "###[", "é\udcff"], "n": 1, "long": "x" * 10**6}
    print_json(facts)
    output = capsys.readouterr().out
    assert refused(output) == []
    assert json.loads(output) == {**facts, "long": shorten("x" * 10**6, LONGEST_VALUE)}


@settings(max_examples=50)
@given(names)
def test_progress_bars_have_harmless_names(name: str) -> None:
    before, sys.stderr = sys.stderr, io.StringIO()
    try:
        with progress_bar(name, 2) as bar:
            bar.update()
            write_above_bars(name)
        for kind, shown in ((ReestimationBar(2, hidden=False), None), (EvaluationBar(2, hidden=False), name)):
            with kind as made:
                if shown is not None:
                    made(shown, 1)
        output = sys.stderr.getvalue()
    finally:
        sys.stderr = before
    assert not [line for line in lines(output) if is_command(line)]
    assert "\x1b]" not in output
    assert "\x1b[2J" not in output


def test_the_streams_are_what_they_were_after_a_command() -> None:
    before = sys.stdout, sys.stderr
    run("inspect", "nothing.pt")
    assert (sys.stdout, sys.stderr) == before


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m ckpt_tools bn-reestimate --help | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


# --- annotations --------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(names)
def test_an_annotation_is_one_line_whose_data_stays_data(name: str) -> None:
    before, sys.stderr = sys.stderr, io.StringIO()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GITHUB_ACTIONS", "true")
            github.annotate("error", f"a{name}, title=x::b")
        output = sys.stderr.getvalue()
    finally:
        sys.stderr = before
    (line, end) = output.split("\n")
    assert end == ""
    assert is_own(line)
    assert len(lines(output)) == len(lines("x\n"))
    assert line.partition("::error title=ckpt-fix::")[2].startswith("a")


# --- all renderers ------------------------------------------------------------------------------------------

NO_NAMES = {  # these show numbers, or parts of what others render
    *(
        "count_text",
        "align_columns",
        "list_names",
        "size_text",
        "library_versions",
        "to_plain_values",
        "dataclass_to_dict",
        "demo_text",
        "escape_markdown",
        "leverage_text",
        "effect_text",
        "measured_text",
        "is_worse",
        "explanation_command",  # a part of explanation_text
    ),
    *(
        "checkpoint_page",
        "folder_page",
        "evaluation_page",
        "sites_section",
        "metrics_section",
        "flagged_section",
    ),
    *(
        "control_verdict",
        "data_verdict",
        "worst_verdict",
        "get_mapping",
        "get_mappings",
        "median_ratios",
        "most_changed_layer",
        "rewritten_layers",
        "layer_role",
    ),
    *(
        "metrics_by_name",
        "metric_unit",
        "draw_chart",
        "measured_points",
        "require_templates",
        "check_reports",
        "parse_records",
    ),
    *("check_manifest", "check_earlier_figure"),
    *(
        "check_figure",
        "write_signals_figure",
        "write_report",
    ),  # files; their texts are those of html and markdown
}
MODULES_WITHOUT = {"axis", "marks", "number_format", "layer_tables"}


def renderers() -> Iterator[tuple[Any, str]]:
    """Every public function of the package that makes something to be shown, with its module."""
    for found in pkgutil.walk_packages(ckpt_tools.report.__path__, "ckpt_tools.report."):
        module, stem = importlib.import_module(found.name), found.name.rpartition(".")[2]
        for name, function in vars(module).items():
            ours = inspect.isfunction(function) and function.__module__ == module.__name__
            if ours and not name.startswith("_") and stem not in MODULES_WITHOUT and name not in NO_NAMES:
                yield module, name


NOTED: dict[
    str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
] = {}  # the last call of each renderer


def note(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **more: Any) -> Any:
        NOTED[name] = (function, arguments, more)
        return function(*arguments, **more)

    return call


@pytest.fixture(scope="module")
def _calls(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the commands give to every renderer: they are run once, and each call is noted."""
    pytest.importorskip("torchmetrics")

    folder = tmp_path_factory.mktemp("calls")
    (folder / "runs").mkdir()
    images = torch.cat(nets.batches((3, 8, 8)))
    state = nets.trained(nets.DenseNet(), nets.batches((3, 8, 8))).state_dict()
    extra = {"args": {"data": "x"}, "note": "y", "optimizer": {"state": {0: {"m": torch.ones(2)}}}}
    torch.save({"state_dict": state, **extra}, folder / "net.pt")
    torch.save(state, folder / "runs" / "a.pt")
    (folder / "runs" / "b.pt").write_bytes(b"damaged")
    torch.save(nets.DenseNet().state_dict(), folder / "fresh.pt")
    np.save(folder / "data.npy", images.numpy())
    np.savez(folder / "labelled.npz", images=images.numpy(), labels=np.arange(len(images)) % 5)
    (folder / "photos").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    (folder / "photos" / "unreadable.png").write_bytes(b"")
    arch = ["--arch", "nets:DenseNet"]
    data = ["--data", "data.npy", *arch, "--force", "-q"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (*IN_GITHUB.items(), ("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))):
            patch.setenv(name, value)
        noting = {
            getattr(module, name): note(f"{module.__name__}.{name}", getattr(module, name))
            for module, name in renderers()
        }
        for module in [module for name, module in sys.modules.items() if name.startswith("ckpt_tools.")]:
            for name, value in list(vars(module).items()):
                if inspect.isfunction(value) and value in noting:
                    patch.setattr(module, name, noting[value])
        inspected = ["inspect", "net.pt", *arch, "--input-size", "3,8,8"]
        judged = ["bn-reestimate", "net.pt", *data, "--eval-data", "labelled.npz", "--gate"]
        run(*judged, "error <= 100", "--report", "x.html", "--report", "x.md")
        run(*judged, "error < 0", "-o", "x.safetensors")
        run("bn-reestimate", "net.pt", *data, "--estimator", "pooled", "-o", "pooled.safetensors")
        run("bn-reestimate", "runs", *data, "--report", "runs.html")
        photos = ["--data", "photos", *arch, "--input-size", "3,8,8", "--force", "-q"]
        run("bn-reestimate", "net.pt", *photos, "-o", "photos.safetensors")
        run("evaluate", "net.pt", "--before", "net.pt", "--data", "labelled.npz", *arch, "-q")
        for more in ([], ["--json"]):
            run(*inspected, *more)
            run("inspect", "net.pt", *arch, "--data", "data.npy", *more)
            run("convert", "net.pt", "--overwrite", *more)
            run("diff", "net.pt", "fresh.pt", *more)
            run("init-rewrite", "fresh.pt", *arch, "--input-size", "3,8,8", "--verify", "--overwrite", *more)


@pytest.mark.usefixtures("_calls")
def test_no_renderer_is_forgotten() -> None:
    """A new one is noted where a command uses it, or is named above with the reason why it shows no name."""
    assert {f"{module.__name__}.{name}" for module, name in renderers()} == set(NOTED)


@pytest.mark.usefixtures("_calls")
@settings(max_examples=15, phases=[Phase.generate])  # one failing text of many is enough
@given(st.lists(names, min_size=7, max_size=7, unique=True))
def test_every_renderer_is_harmless(texts: list[str]) -> None:
    for name, (function, arguments, more) in sorted(NOTED.items()):
        made = function(*hostile(arguments, itertools.cycle(texts).__next__), **more)
        assert refused(printed(name, made)) == [], name
        if name.endswith("_text") and isinstance(made, str):
            usual = function(*hostile(arguments, itertools.cycle("abcdefg").__next__), **more)
            if not name.endswith("folder_text"):  # where messages of several lines are indented
                assert len(made.splitlines()) == len(usual.splitlines()), (name, made)  # no name makes a line
            assert all(line.isprintable() for line in made.split("\n")), (name, made)


@pytest.mark.usefixtures("_calls")
def test_every_text_is_bounded() -> None:
    for name, (function, arguments, more) in sorted(NOTED.items()):
        made = function(*hostile(arguments, lambda: "x" * 10**5), **more)
        assert max(map(len, printed(name, made).splitlines()), default=0) < 3 * LONGEST_VALUE, name


def hostile(arguments: tuple[Any, ...], give: Callable[[], str]) -> list[Any]:
    return [filled(one, give) if isinstance(one, dict | list) else poisoned(one, give) for one in arguments]


def printed(name: str, made: Any) -> str:
    """What is printed of a result, as a command prints it."""
    if name.endswith(("_json", "record_of")):
        return shown(print_json, [made])
    return shown(print_result, [made] if isinstance(made, str) else made)


def shown(printing: Callable[[Any], None], texts: Iterable[Any]) -> str:
    before, sys.stdout = sys.stdout, io.StringIO()
    try:
        with guarded_streams():
            for text in texts:
                printing(text)
        return sys.stdout.getvalue()
    finally:
        sys.stdout = before


# --- all commands -------------------------------------------------------------------------------------------

in_files = names.filter(lambda name: "\0" not in name and name.isprintable() is not None)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(in_files, min_size=3, max_size=3, unique=True))
def test_every_command_on_hostile_files(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    key, word, name = (text.encode("utf-8", "replace").decode() for text in texts)
    name = name.replace("/", "")[:60] + ".pt"
    np.save("data.npy", np.zeros((4, 3, 8, 8), np.float32))
    save_file({key: torch.ones(2), "bn.running_var": torch.ones(2)}, "a.safetensors")
    save_file({key: torch.zeros(2), "bn.running_var": torch.ones(2)}, "b.safetensors", {"arch": word})
    torch.save({"state_dict": {key: torch.ones(2)}, "arch": word, "args": {word: word}}, "words.pt")
    Path(name).write_bytes(b"damaged")
    data = ["--data", "data.npy"]
    for arguments in (
        ["diff", "a.safetensors", "b.safetensors"],
        ["diff", "a.safetensors", "b.safetensors", "--json"],
        ["inspect", "words.pt"],
        ["inspect", "words.pt", "--json"],
        ["inspect", f"./{name}"],
        ["inspect", "words.pt", "--arch", word],
        ["convert", f"./{name}"],
        ["convert", "words.pt", "-o", f"./{name}.safetensors", "--overwrite"],
        ["convert", "words.pt", "--weights", word],
        ["bn-reestimate", "words.pt", *data],
        ["bn-reestimate", ".", *data, "--manifest", "m.jsonl"],
        ["evaluate", "words.pt", "--data", word],
        ["init-rewrite", "words.pt", "--arch", word, "--overwrite"],
        ["inspect", f"--{word}"],
        ["inspect", "words.pt", word],
        [word],
        [f"--{word}"],
    ):
        result = run(*arguments, **IN_GITHUB, CKPT_FIX_TRACEBACK="1")
        assert isinstance(result.exception, SystemExit | None), arguments
        output = [line for line in lines(result.output) if not is_own(line)]
        assert refused("\n".join(output)) == [], arguments


def test_an_architecture_of_megabytes(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "arch": "x" * 5_000_000}, tmp_path / "x.pt")
    for arguments in (["inspect", tmp_path / "x.pt"], ["inspect", tmp_path / "x.pt", "--json"]):
        assert len(run(*arguments, **IN_GITHUB).output) < 20_000
    result = run("bn-reestimate", tmp_path / "x.pt", "--data", tmp_path / "x.pt", **IN_GITHUB)
    assert result.exit_code == 1
    assert 100 < len(result.output) < 20_000


def test_a_name_cannot_forge_a_message() -> None:
    result = run("inspect", "x\nckpt-fix: all is well\n::error::y.pt")
    assert [line[:9] for line in result.stderr.splitlines()] == ["ckpt-fix:", "  ckpt-fi", ": :error:"]


def test_a_message_is_not_repeated_without_end() -> None:
    assert len(error_boundary._presentable(f"x.pt: {['y' * 1000] * 1000} is no name.")) <= LONGEST_VALUE
