"""Coverage-guided fuzzing of one reader by atheris (libFuzzer for Python), which keeps what reaches
new code.

atheris is no dependency: pip install atheris. It starts from the seeds, and changes them as
`scripts/run fuzz` does.
"""

from __future__ import annotations

import importlib
import random
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

from ckpt_tools.errors import CkptToolsError
from fuzz.damaged_formats import mutate
from fuzz.readers import READERS
from fuzz.seeds import Seed, seeds

__all__ = ["guide"]

_LARGEST = 1 << 20  # bytes of an input


def guide(reader: str, seconds: int, crashes: Path) -> None:
    """Fuzz the file that a reader gets, or the first of its folder, and end the process.

    Raises ImportError if atheris is not installed.
    """
    atheris: Any = importlib.import_module("atheris")
    _instrument(atheris)
    first = seeds(reader)[0]
    changed = first.entry or sorted(first.files)[0]
    parts = [seed.files[changed] for seed in seeds(reader) if changed in seed.files]
    corpus = Path(tempfile.mkdtemp(prefix="fuzz-corpus-"))
    for number, part in enumerate(parts):
        (corpus / str(number)).write_bytes(part)
    crashes.mkdir(parents=True, exist_ok=True)

    def read(data: bytes) -> None:
        path = corpus.with_name(f"{corpus.name}-case")
        _put(Seed({**first.files, changed: data}, first.entry), path)
        try:
            with warnings.catch_warnings(action="ignore"):
                READERS[reader](path / first.entry)
        except CkptToolsError:
            return

    def change(data: bytes, largest: int, seed: int) -> bytes:
        return mutate(data, random.Random(seed), parts)[:largest]

    flags = [
        f"-max_total_time={seconds}",
        f"-max_len={_LARGEST}",
        f"-artifact_prefix={crashes}/",
        "-timeout=5",
    ]
    atheris.Setup([sys.argv[0], *flags, "-rss_limit_mb=4096", str(corpus)], read, custom_mutator=change)
    atheris.Fuzz()


def _put(seed: Seed, folder: Path) -> None:
    for name, content in seed.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _instrument(atheris: Any) -> None:
    """Count what is reached in the readers' own functions."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("ckpt_tools.storage", "ckpt_tools.data")):
            classes = [
                item for item in vars(module).values() if isinstance(item, type) and item.__module__ == name
            ]
            for holder in (module, *classes):
                for item in vars(holder).values():
                    if isinstance(item, types.FunctionType) and item.__module__ == name:
                        atheris.instrument_func(item)
