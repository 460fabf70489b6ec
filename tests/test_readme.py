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
    for name in (
        "reestimate_bn",
        "walk",
        "load",
        "rewrite_init",
        "activation_moments",
        "corrected_state_dict",
    ):
        assert f"ckpt_tools.{name}(" in README
    assert ckpt_tools.__all__ == sorted(ckpt_tools.__all__)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("resnet18").state_dict(), "model.pt")
    data = nets.batches((3, 8, 8))
    names = {"new_model": nets.DenseNet(), "linear": torch.nn.Linear(4, 3), "torch": torch}
    names |= {
        "model": nets.DenseNet(),
        "swa_model": nets.DenseNet(),
        "loader": data,
        "example_batch": data[0],
    }
    for block in re.findall(r"```python\n(.+?)```", README, re.DOTALL):
        if "ckpt_tools" in block:
            exec(block, names)
    assert names["result"].rewritten


def test_the_map_names_every_room_and_only_files_that_exist() -> None:
    tree = README.split("```\nckpt_tools/")[1].split("```")[0]
    rows = [re.findall(r"[\w/]+\.py|[\w]+/", line) for line in tree.splitlines()]
    folders = {path.parent.name for path in (ROOT / "ckpt_tools").glob("*/__init__.py")}
    assert {row[0].rstrip("/") for row in rows if row and row[0].endswith("/")} - {
        "adapters",
        "scripts",
    } == folders
    for row in rows:
        room = ROOT / (
            row[0] if row and row[0] in ("adapters/", "scripts/") else f"ckpt_tools/{row[0]}" if row else ""
        )
        for name in row:
            place = room if room.is_dir() else room.parent
            assert any(place.rglob(name.rstrip("/"))) or (place / name).exists() or place.name == name[:-1], (
                name
            )
