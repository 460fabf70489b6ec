"""The README's commands parse and its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import nets
import pytest
import torch

import ckpt_tools
from ckpt_tools.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    helps = [command.help or "" for command in main.commands.values()]
    return re.findall(r"^ +ckpt-fix (.+)$", "\n".join([README, main.help or "", *helps]), re.MULTILINE)


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    main.commands[name].make_context(name, arguments)


def test_every_command_and_public_name_is_shown() -> None:
    assert all(f"ckpt-fix {name}" in README for name in main.commands)
    for name in ("reestimate_bn", "walk", "load", "rewrite_init", "activation_moments", "corrected_state_dict"):
        assert f"ckpt_tools.{name}(" in README
    assert ckpt_tools.__all__ == sorted(ckpt_tools.__all__)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("resnet18").state_dict(), "model.pt")
    data = nets.batches((3, 8, 8))
    names = {"new_model": nets.DenseNet(), "linear": torch.nn.Linear(4, 3), "torch": torch}
    names |= {"model": nets.DenseNet(), "swa_model": nets.DenseNet(), "loader": data, "example_batch": data[0]}
    for block in re.findall(r"```python\n(.+?)```", README, re.DOTALL):
        if "ckpt_tools" in block:
            exec(block, names)
    assert names["result"].rewritten


def test_files_named_in_the_tree_exist() -> None:
    tree = README.split("```\nckpt_tools/\n")[1].split("```")[0]
    for name in re.findall(r"^  ([\w.]+)", tree, re.MULTILINE):
        assert (ROOT / "ckpt_tools" / name).exists(), name
