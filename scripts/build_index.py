"""Build the index that recognises the architecture of a bare state dict.

It lists the tensors of every timm and torchvision model, without weights. Run it after timm or
torchvision was raised.

\b
scripts/run build_index             writes ckpt_tools/identify/index.json.gz
scripts/run build_index --check     does the shipped index agree with the installed libraries?
scripts/run build_index --check --only '*:resnet*'
"""

from __future__ import annotations

import fnmatch
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import click
from torch.nn import init

from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify import plugins
from ckpt_tools.identify.architecture_index import (
    ArchitectureIndex,
    IndexEntry,
    encode_index,
    load_shipped_index,
    make_index_entry,
)
from ckpt_tools.identify.skeleton import (
    CHANNEL_KEYWORDS,
    CLASS_KEYWORDS,
    build_skeleton,
    keys_depending_on,
    state_dict_shapes,
)
from zoo.models import Checked, architectures, check_all

TARGET = Path(__file__).parent.parent / "ckpt_tools" / "identify" / "index.json.gz"
LIBRARIES = ("timm", "torchvision")
LARGEST_FILE = 60_000  # bytes
# Heads that a default build leaves out, and that published weights have.
OPTIONAL_HEADS = {"torchvision": {"aux_loss": True}}


@dataclass(frozen=True)
class Indexed(Checked):
    entry: IndexEntry | None = None


@contextmanager
def no_initialisation() -> Iterator[None]:
    """Let constructors fill no tensor.

    That halves the time, and no constructor asks for values on the meta device.
    """
    names = [name for name in vars(init) if name.endswith("_") and not name.startswith("_")]
    with mock.patch.multiple(init, **dict.fromkeys(names, lambda tensor, *_args, **_kwargs: tensor)):
        yield


def index_one(architecture: str) -> Indexed:
    adapter, name = plugins.resolve(architecture)
    with no_initialisation():
        shapes = state_dict_shapes(build_skeleton(adapter, name, {}))
        head = keys_depending_on(adapter, name, {}, CLASS_KEYWORDS, shapes)
        stem = keys_depending_on(adapter, name, {}, CHANNEL_KEYWORDS, shapes)
        try:
            extra = OPTIONAL_HEADS.get(adapter.prefix)
            head |= keys_depending_on(adapter, name, extra, CLASS_KEYWORDS) if extra else frozenset()
        except ArchitectureError:
            pass  # it has no such head
    return Indexed(architecture, entry=make_index_entry(architecture, shapes, head, stem))


def compare(built: ArchitectureIndex, only: str) -> list[str]:
    """A line for every architecture about which the shipped index says something else."""
    shipped_entries = {
        entry.architecture: entry
        for entry in load_shipped_index().entries
        if fnmatch.fnmatch(entry.architecture, only)
    }
    built_entries = {entry.architecture: entry for entry in built.entries}
    versions = load_shipped_index().versions
    lines = [
        f"{lib} {v}, the index has {versions.get(lib)}"
        for lib, v in built.versions.items()
        if versions.get(lib) != v
    ]
    lines += [f"{name}: not in the index" for name in built_entries.keys() - shipped_entries.keys()]
    lines += [
        f"{name}: in the index, not in the library" for name in shipped_entries.keys() - built_entries.keys()
    ]
    return lines + [
        f"{name}: has other tensors"
        for name in built_entries.keys() & shipped_entries.keys()
        if built_entries[name] != shipped_entries[name]
    ]


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Compare with the index that ships; exit 1 if it differs.")
@click.option("--only", default="*", metavar="PATTERN", help="With --check: names such as 'timm:resnet*'.")
@click.option("--jobs", default=2, show_default=True)
def main(check: bool, only: str, jobs: int) -> None:
    if only != "*" and not check:
        raise click.UsageError("--only goes with --check: an index of some models would name these for all.")
    started = time.perf_counter()
    results: list[Indexed] = check_all(index_one, list(architectures(only)), jobs, None)
    for result in results:
        if result.failure:
            print(f"FAILED {result.architecture}: {result.failure}")
    entries = tuple(result.entry for result in results if result.entry is not None)
    index = ArchitectureIndex({library: version(library) for library in LIBRARIES}, entries)
    print(f"{len(entries)} of {len(results)} architectures in {time.perf_counter() - started:.0f} s")
    if check:
        differences = compare(index, only)
        print("\n".join(sorted(differences)) or "the shipped index says the same")
        sys.exit(1 if differences else 0)
    data = encode_index(index)
    print(f"{TARGET}: {len(data):,} bytes")
    if len(data) > LARGEST_FILE:
        sys.exit(f"expected at most {LARGEST_FILE:,} bytes")
    TARGET.write_bytes(data)


if __name__ == "__main__":
    main(prog_name="scripts/run build_index")
