"""Five commands on every hostile or odd file open nothing elsewhere and start no connection, process or code.

One process does it all, as an audit hook stays for good and libraries take seconds to import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


def test_hostile_files_lead_nowhere(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY")
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    root = SUPPORT.parents[1]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (root, root / "adapters", SUPPORT)))
    environment |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SUPPORT / "audited.py"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    findings = json.loads(done.stdout)
    lines = [
        f"{one['event']}: {one['what']}\n    in: {one['command']}\n    with: {one['file']}"
        for one in findings
    ]
    assert not lines, "\n".join([f"{len(lines)} findings", *lines[:40]])
    assert int(done.stderr.split()[-2]) > 1500  # commands
