"""The conformance suite that is shipped: it runs in others' pytest, and sees what adapters do wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from test_adapters import SmallNet
from torch import nn

from ckpt_tools.contract import InputSpec, Recipe
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.file_arguments import ArgumentKind, Rate
from ckpt_tools.testing import CHECKS, Case

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


class ZooAdapter:
    """A correct adapter of one architecture. The faulty ones below change one method each."""

    prefix = "zoo"

    def architectures(self) -> list[str]:
        return ["small"]

    def recognise(self, words: Mapping[str, object]) -> Recipe | None:
        return Recipe("zoo", "small") if words.get("arch") == "zoo:small" else None

    def build(self, name: str, kwargs: Mapping[str, object]) -> nn.Module:
        unknown = sorted({*kwargs} - {"num_classes", "drop_rate"})
        if name != "small" or unknown:
            raise ArchitectureError(f"zoo:{name} {unknown}: expected zoo:small with num_classes, drop_rate.")
        return SmallNet(**kwargs)

    def class_kwargs(
        self, shapes: Mapping[str, tuple[int, ...]], name: str, kwargs: Mapping[str, object]
    ) -> dict[str, object]:
        return {"num_classes": shapes["head.bias"][0]} if "head.bias" in shapes else {}

    def rate_kwargs(self, name: str) -> tuple[str, ...]:
        return ("drop_rate",)

    def input_spec(self, model: nn.Module, name: str, words: Mapping[str, object]) -> InputSpec | None:
        return InputSpec((3, 8, 8), origin="zoo")

    def file_arguments(self, name: str) -> Mapping[str, ArgumentKind]:
        return {"drop_rate": Rate()}


class AdmitsEverything:
    def admit(self, value: object, evidence: object) -> object:
        return value


SHARED = SmallNet()
FAULTS = {  # the check that sees it, the method that is wrong, and how
    "check_a_file_cannot_name_anything_in_an_argument": (
        "file_arguments",
        lambda *_: {"a": AdmitsEverything()},
    ),
    "check_protocol": ("architectures", lambda *_: ["small", "another"]),
    "check_builds_a_new_module_offline": ("build", lambda *_: SHARED),
    "check_unknown_names_and_arguments_are_named": ("build", lambda *_: SmallNet()),
    "check_sizes_follow_from_shapes": ("class_kwargs", lambda *_: {}),
    "check_strange_shapes_do_not_confuse": ("class_kwargs", lambda *_: {0: 1}),
    "check_rates_are_taken_and_keep_the_keys": ("rate_kwargs", lambda *_: ["num_classes"]),
    "check_words_give_its_own_recipe_or_none": ("recognise", lambda *_: Recipe("zoo", "small")),
    "check_the_input_fits_the_model": (
        "input_spec",
        lambda *_: InputSpec((3, 8, 8), crop_pct=2.0, origin="zoo"),
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_check_passes_a_correct_adapter_and_sees_its_fault(check, monkeypatch):
    check(Case(ZooAdapter, "small"))
    method, fault = FAULTS[check.__name__]
    monkeypatch.setattr(ZooAdapter, method, fault)
    with pytest.raises((AssertionError, TypeError)):
        check(Case(ZooAdapter, "small"))


def test_the_example_of_the_guide_runs_in_a_third_partys_pytest(tmp_path):
    (example,) = (
        block for block in re.findall(r"```python\n(.+?)```", CONTRIBUTING, re.DOTALL) if "testing" in block
    )
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "ckpt.py").write_text("from test_testing import ZooAdapter as MyZooAdapter\n")
    (tmp_path / "test_ckpt.py").write_text(example.replace("small_model", "small"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "test_ckpt.py",
    ]
    paths = ":".join([str(tmp_path), str(Path(__file__).parent), *sys.path])
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": paths}, capture_output=True, text=True)
    assert f"{len(CHECKS)} passed" in done.stdout, done.stdout + done.stderr


def test_the_suite_itself_imports_no_pytest():
    script = "import sys, ckpt_tools.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
