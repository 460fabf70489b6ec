"""An architecture that is named by its file gets the name of its module."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify.plugins import resolve


def build(architecture: str) -> None:
    adapter, name = resolve(architecture)
    adapter.build(name, {})


@pytest.mark.parametrize(
    ("architecture", "advice"),
    [
        ("train.py:Net", "train:Net."),
        ("./train.py:build.small", "train:build.small."),
        ("train.py", "train:NAME."),
        ("models/net.py:Net", "net:Net from the folder models, or models.net:Net from here."),
        ("my-train.py:Net", "rename it to my_train.py, and write my_train:Net."),
    ],
)
def test_a_script_is_named_as_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, advice: str
) -> None:
    (tmp_path / "train.py").write_text("raise RuntimeError('a script may do anything: it is not imported')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArchitectureError) as raised:
        build(architecture)
    assert str(raised.value).endswith(advice)
