"""WebDataset shards against tarfile, webdataset and braceexpand, and against the same images in a folder."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ckpt_tools.contract import InputSpec
from ckpt_tools.data import open_source
from ckpt_tools.data.images.image_files import IMAGE_EXTENSIONS
from ckpt_tools.data.labelled_stream import labelled_batches
from ckpt_tools.data.sample_order import FULL_SHARE, Reading, Share
from ckpt_tools.data.shards import shard_index
from ckpt_tools.data.shards.sample_grouping import group_members, image_extension
from ckpt_tools.data.shards.sample_mixing import batch_evenly, interleave_sources, shuffle_within_buffer
from ckpt_tools.data.shards.shard_names import expand_braces
from ckpt_tools.data.shards.tar_members import TarReader
from ckpt_tools.errors import CkptToolsError, DataError, RemoteError, UsageError

SPEC = InputSpec((3, 8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
EVEN = InputSpec((1, 4, 4))
MEMORY = fsspec.filesystem("memory")


def packed(members: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def png(number: int, size: tuple[int, int] = (10, 12)) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "PNG")
    return content.getvalue()


def grey(level: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((4, 4), level, np.uint8)).save(content, "PNG")
    return content.getvalue()


def levels(shards: Sequence[Sequence[int]], *, label: bool = True) -> list[bytes]:
    """Shards of even images, whose level is also their class."""
    made = []
    for number, shard in enumerate(shards):
        members = []
        for level in shard:
            members += [(f"{number}-{level:03}.cls", f"{level}\n".encode())] if label else []
            members += [(f"{number}-{level:03}.png", grey(level)), (f"{number}-{level:03}.json", b"{}")]
        made.append(packed(members))
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ninety images in ``images/``, and the same in three shards that webdataset wrote, in ``shards/``."""
    webdataset = pytest.importorskip("webdataset")
    (tmp_path / "images").mkdir()
    (tmp_path / "shards").mkdir()
    with webdataset.ShardWriter(f"{tmp_path}/shards/train-%03d.tar", maxcount=30, verbose=0) as writer:
        for number in range(90):
            content = png(number)
            (tmp_path / "images" / f"{number:04}.png").write_bytes(content)
            writer.write(
                {"__key__": f"{number:04}", "png": content, "cls": number % 7, "json": {"any": "thing"}}
            )
    return tmp_path


@pytest.fixture
def remote() -> Iterator[str]:
    yield "memory://bucket/shards"
    if MEMORY.exists("/bucket"):
        MEMORY.rm("/bucket", recursive=True)


def put(remote: str, shards: Sequence[bytes]) -> str:
    for number, content in enumerate(shards):
        MEMORY.pipe(f"{remote}/train-{number:02}.tar", content)
    return f"{remote}/train-{{00..{len(shards) - 1:02}}}.tar"


def samples(spec: object, seed: int = 0, limit: int | None = None, **options: object) -> torch.Tensor:
    reading = {"batch_size": 8, "workers": 0, **options}
    return torch.cat(list(open_source(str(spec), seed=seed, limit=limit).batches(SPEC, Reading(**reading))))  # type: ignore[arg-type]


def seen(
    spec: object, share: Share = FULL_SHARE, limit: int | None = None, seed: int = 0, workers: int = 0
) -> list[int]:
    source = open_source(str(spec), limit=limit, seed=seed)
    batches = source.batches(EVEN, Reading(batch_size=5, workers=workers, share=share))
    return [level for batch in batches for level in batch[:, 0, 0, 0].mul(255).round().int().tolist()]


def test_they_are_the_images_of_a_folder(folder: Path) -> None:
    wanted = samples(folder / "images", seed=3)
    source = open_source(str(folder / "shards"))
    assert (source.kind, source.count, source.sample_shape, source.is_preprocessed) == (
        "shards",
        90,
        None,
        False,
    )
    for name in (
        "shards",
        "shards/train-{000..002}.tar",
        "shards/train-*.tar",
        "shards/train-00[012].tar",
        "{shards,shards}/*",
    ):
        assert torch.equal(samples(folder / name, seed=3, workers=2), wanted)
    assert torch.equal(samples(folder / "shards", seed=3, limit=40, batch_size=50), wanted[:40])
    assert not torch.equal(samples(folder / "shards", seed=4), wanted)
    assert len(samples(folder / "shards/train-001.tar")) == 30
    assert torch.equal(samples(f"file://{folder}/shards/train-{{000..002}}.tar", seed=3), wanted)


def test_statistics_are_those_of_a_folder(folder: Path) -> None:
    import nets

    from ckpt_tools import reestimate_bn

    found = []
    for name in ("images", "shards"):
        torch.manual_seed(0)
        model = nets.DenseNet()
        reestimate_bn(
            model,
            open_source(str(folder / name)).batches(SPEC, Reading(batch_size=32, workers=0)),
            force=True,
        )
        found.append(
            torch.cat([buffer for key, buffer in model.named_buffers() if key.endswith("running_var")])
        )
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)


def test_a_folder_of_images_and_shards_is_one_of_images(folder: Path) -> None:
    (folder / "images/extra.tar").write_bytes(b"")
    assert open_source(str(folder / "images")).kind == "folder"


def test_of_several_images_in_a_sample_one_is_taken(tmp_path: Path) -> None:
    assert image_extension(["png", "cls", "jpg"]) == "jpg"
    assert image_extension(["mask.png", "txt"]) is None
    assert all(image_extension([extension[1:]]) for extension in IMAGE_EXTENSIONS)
    members = [("a.mask.png", grey(1)), ("a.PNG", grey(2)), ("a.bmp", grey(3)), ("deep/er/b.png", grey(4))]
    members += [
        (".hidden.png", b""),
        ("c/._b.png", b""),
        ("__meta__/d.png", b""),
        ("none", b""),
        ("words.txt", b""),
    ]
    (tmp_path / "a.tar").write_bytes(packed(members))
    assert sorted(seen(tmp_path / "a.tar")) == [2, 4]


def test_links_and_devices_are_nothing(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("../../a.png")
        info.size = len(grey(7))
        archive.addfile(info, io.BytesIO(grey(7)))
    assert seen(tmp_path / "a.tar") == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("far", [False, True])
def test_unreadable_images_are_skipped_and_named(
    tmp_path: Path, remote: str, workers: int, far: bool
) -> None:
    members = [(f"{number:03}.png", b"no image" if number in (7, 150) else grey(1)) for number in range(200)]
    (tmp_path / "a.tar").write_bytes(packed(members))
    put(remote, [packed(members)])
    source = open_source(f"{remote}/train-00.tar" if far else str(tmp_path / "a.tar"))
    stream = source.batches(EVEN, Reading(batch_size=32, workers=workers))
    for _ in range(2):
        assert sum(map(len, stream)) == 198
    shard = "train-00.tar" if far else "a.tar"
    assert sorted((what.name, what.reason) for what in stream.skipped_samples) == [
        (f"{shard}/007.png", "no image"), (f"{shard}/150.png", "no image"),
    ]  # fmt: skip
    members[3] = ("003.png", b"")
    (tmp_path / "a.tar").write_bytes(packed(members))
    put(remote, [packed(members)])
    with pytest.raises(DataError, match=r"3 of 200 samples are unreadable .*\(empty file\)"):
        list(open_source(source.spec).batches(EVEN, Reading(batch_size=200, workers=workers)))


@pytest.mark.parametrize("far", [False, True])
def test_absurd_sizes_and_names(
    tmp_path: Path, remote: str, far: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_index, "MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr("ckpt_tools.data.shards.raw_shards.MAX_IMAGE_BYTES", 1000)
    members = [(f"{number}.png", grey(1)) for number in range(99)] + [
        ("\x1b[31m" + "x" * 999 + ".png", b"." * 1001)
    ]
    (tmp_path / "a.tar").write_bytes(packed(members))
    put(remote, [packed(members)])
    stream = open_source(f"{remote}/train-00.tar" if far else str(tmp_path / "a.tar")).batches(
        EVEN, Reading(batch_size=9, workers=0)
    )
    assert sum(map(len, stream)) == 99
    (what,) = stream.skipped_samples
    assert what.reason == "1,001 bytes, more than an image has"
    assert what.name.isprintable()
    assert len(what.name) <= 300
    huge = bytearray(packed([("a.png", grey(1))]))
    for size in (2**62, 2**33):  # of a member, and of the header that holds its name
        huge[124:136] = b"\x80" + size.to_bytes(11)
        huge[156:157] = b"0" if size > 2**40 else b"x"
        huge[148:156] = b"%06o\0 " % (sum(huge[:148]) + 256 + sum(huge[156:512]))
        (tmp_path / "a.tar").write_bytes(huge)
        put(remote, [bytes(huge)])
        with pytest.raises(DataError, match=r"cut off|a header of|has 8,589,934,592 bytes"):
            seen(f"{remote}/train-00.tar" if far else tmp_path / "a.tar")


BAD = [
    (b"", "found an empty file"),
    (b"\x1f\x8b" + b"x" * 600, "found gzip.*Unpack"),
    (b"PK\x03\x04", "found zip"),
    (b"x" * 2000, "found something else"),
    (bytes(10240), "expected images .* no samples at all"),
    (packed([("a.txt", b""), ("b.image.jpg", b"")]), r"1 × \.txt, 1 × \.image\.jpg"),
    (packed([("a.png", grey(1)), ("a.png", grey(2))]), "found a.png again"),
    (packed([("a.png", grey(1))])[:1024], "mark at the end"),
    (packed([("a.png", grey(1))])[:600], "cut off"),
    (packed([("a.png", grey(1))])[:1024] + b"x" * 1024, "no header at byte 1,024"),
]


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(("content", "words"), BAD)
def test_bad_shards(tmp_path: Path, remote: str, content: bytes, words: str, far: bool) -> None:
    good = levels([[1, 2], [3]])
    for number, shard in enumerate(
        [*good, content] if "images" not in words and "×" not in words else [content]
    ):
        MEMORY.pipe(f"{remote}/a-{number}.tar", shard)
        (tmp_path / f"a-{number}.tar").write_bytes(shard)
    with pytest.raises(DataError, match=words) as caught:
        seen(f"{remote}/a-*.tar" if far else tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{0}/val-{{00..11}}.tar", r"no \.tar shard matches this, the first being .*/val-00\.tar"),
        ("{0}/val-*.tar", r"no \.tar shard matches this, looked for .*/val-\*\.tar"),
        ("{0}/train-{{00..03}}.tar", r"2 of 4 shards are not there, the first being .*train-02"),
        ("{0}/train-{{00..99999999}}.tar", "more than 100,000 shards"),
        ("{0}/" + "{{a,b}}" * 40, "more than 100,000 shards"),
        ("{0}/*.txt", r"expected \.tar shards, found .*note\.txt"),
        ("{0}/train-02.tar", r"Did you mean .*train-0"),
        ("{0}/empty", "no files at all"),
        ("pipe:cat {0}/train-00.tar", "commands are not run"),
        ("pipe:evil", "commands are not run"),
        ("memory://bucket/nothing-{{0..3}}.tar", "memory://bucket/nothing-0.tar: expected a file"),
        ("memory://bucket/nothing-*.tar", r"expected \.tar shards behind this URL"),
        ("memory://bucket/shards/train-{{00..01}}.tar", r"train-01\.tar: expected a file"),
        ("mem://bucket/a.tar", "Did you mean memory"),
    ],
)
def test_lists_that_lead_nowhere(tmp_path: Path, remote: str, spec: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("")
    put(remote, levels([[1]]))
    for number in range(2):
        (tmp_path / f"train-0{number}.tar").write_bytes(levels([[number]])[0])
    with pytest.raises((DataError, RemoteError, UsageError), match=words):
        open_source(spec.format(tmp_path))


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.text("aé/.\udc80", min_size=1, max_size=300), st.binary(max_size=1100)), max_size=6
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.randoms(use_true_random=False),
)
def test_the_reader_finds_what_tarfile_finds(
    members: list[tuple[str, bytes]], format: int, dice: random.Random
) -> None:
    content = packed([(name, data) for name, data in members if not name.endswith("/")], format)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        wanted = [(info.name, info.offset_data, info.size) for info in archive]
    for length in (len(content), None):
        file = io.BytesIO(content)
        assert [(one.name, one.offset, one.size) for one in TarReader(file, "", length)] == wanted
    reader = TarReader(io.BytesIO(content), "")
    assert all(reader.read(one.size) == content[one.offset : one.offset + one.size] for one in reader)
    end = max((offset + size + -size % 512 for _, offset, size in wanted), default=0) + 512
    cut = content[: dice.randrange(end)]
    for length in (len(cut), None):
        with pytest.raises(DataError):
            list(TarReader(io.BytesIO(cut), "", length))
    torn = bytearray(content)
    for _ in range(3):
        torn[dice.randrange(end)] = dice.randrange(256)
    for length in (len(torn), None):
        with contextlib.suppress(DataError):
            list(TarReader(io.BytesIO(torn), "", length))


def test_old_and_long_headers() -> None:
    names = ["d/" * 70 + "a.png", "b" * 99, "prefix" * 20 + "/" + "c" * 90]
    content = packed([(name, b"x") for name in names], tarfile.USTAR_FORMAT)
    assert [one.name for one in TarReader(io.BytesIO(content), "")] == names
    old = bytearray(packed([("a.png", b"x")], tarfile.USTAR_FORMAT))
    old[156:157], old[257:512] = b"\0", bytes(255)
    old[148:156] = b"%06o\0 " % (sum(old[:148]) + 256 + sum(old[156:512]))
    assert [one.name for one in TarReader(io.BytesIO(old), "")] == ["a.png"]


def test_sparse_members_are_refused() -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        info = tarfile.TarInfo("a.bmp")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        archive.addfile(info)
    content.seek(0)
    with pytest.raises(DataError, match="sparse"):
        list(TarReader(content, ""))


NAMES = st.lists(st.sampled_from(["", "a", "b", "a/", "a.b/", "_", "__m__", "__m__/"]), max_size=2).map(
    "".join
)
EXTENSION = st.lists(st.sampled_from([".png", ".PNG", ".cls", ".a.b", ".", ""]), max_size=2).map("".join)


@settings(max_examples=100)
@given(st.lists(st.tuples(NAMES, EXTENSION).map("".join), max_size=12))
def test_groups_are_webdatasets(names: list[str]) -> None:
    tariterators = pytest.importorskip("webdataset.tariterators")
    # hidden files, which WebDataset takes for members of a sample named as their folder, are no samples here
    names = [
        name
        for name in names
        if name and not name.rpartition("/")[2].startswith(".") and not name.endswith("/")
    ]

    def outcome(groups: object) -> object:
        try:
            return [(key, dict(parts)) for key, parts in groups]  # type: ignore[attr-defined]
        except (ValueError, DataError):
            return "twice"

    archive = io.BytesIO(packed([(name, str(number).encode()) for number, name in enumerate(names)]))
    files = list(tariterators.tar_file_expander([{"url": "u", "stream": archive}]))
    theirs = (
        (sample["__key__"], {part: int(data) for part, data in sample.items() if not part.startswith("__")})
        for sample in tariterators.group_by_keys(files)
    )
    ours = (
        (sample.key, sample.parts)
        for sample in group_members(zip(names, range(len(names)), strict=True), "shard")
    )
    assert outcome(ours) == outcome(theirs)


PATTERN = st.recursive(
    st.sampled_from(
        ["a", "tr-", "{0..3}", "{08..11}", "{3..1}", "{-1..1}", "{0..9..4}", "{c..e}", "{x}", "{}", ""]
    ),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: "{" + ",".join(parts) + "}")
        | st.tuples(inner, inner).map("".join)
    ),
    max_leaves=5,
)


@settings(max_examples=100)
@given(PATTERN)
def test_braces_are_braceexpands(pattern: str) -> None:
    braceexpand = pytest.importorskip("braceexpand")
    assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern, escape=False))


@given(st.lists(st.lists(st.integers(), max_size=40), max_size=9), st.integers(1, 4), st.integers(1, 9))
def test_mixing_loses_nothing(shards: list[list[int]], together: int, size: int) -> None:
    items = list(interleave_sources(map(iter, shards), together))
    everything = Counter(item for shard in shards for item in shard)
    assert Counter(items) == everything
    mixed = list(shuffle_within_buffer(items, 0, max_items=5, weight=lambda _: 1, max_weight=99))
    assert Counter(mixed) == everything
    assert mixed == list(shuffle_within_buffer(items, 0, max_items=5, weight=lambda _: 1, max_weight=99))
    batches = list(batch_evenly(mixed, size))
    assert [item for batch in batches for item in batch] == mixed
    sizes = [len(batch) for batch in batches]
    assert sizes[:-2] == [size] * len(sizes[:-2])
    assert max(sizes[-2:], default=0) - min(sizes[-2:], default=0) <= (size if len(sizes) > 2 else 1)
    assert not sizes or min(sizes) >= min(len(mixed), size // 2)


def test_shuffling_holds_back_what_it_may() -> None:
    drawn = []
    for item in shuffle_within_buffer(iter(range(100)), 1, max_items=10, weight=lambda _: 1, max_weight=1000):
        drawn.append(item)
    assert all(item <= place + 10 for place, item in enumerate(drawn))
    assert drawn != list(range(100))
    heavy = list(shuffle_within_buffer(iter(range(100)), 1, max_items=50, weight=lambda _: 10, max_weight=10))
    assert all(item <= place + 1 for place, item in enumerate(heavy))


@pytest.mark.parametrize("shards", [1, 2, 20])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_read_everything_once(tmp_path: Path, remote: str, shards: int, world: int) -> None:
    contents = levels([list(range(shard, 60, shards)) for shard in range(shards)])
    url = put(remote, contents)
    for number, content in enumerate(contents):
        (tmp_path / f"{number:02}.tar").write_bytes(content)
    for spec in (url, tmp_path):
        parts = [seen(spec, Share(rank, world)) for rank in range(world)]
        assert sorted(level for part in parts for level in part) == list(range(60))
        assert min(map(len, parts)) >= 60 // world - 60 // shards
        limited = [seen(spec, Share(rank, world), limit=20) for rank in range(world)]
        assert len({level for part in limited for level in part}) == sum(map(len, limited)) == 20
        assert sorted(level for part in limited for level in part) == sorted(seen(spec, limit=20))


def test_ranks_read_the_limit_though_shards_differ(remote: str) -> None:
    url = put(remote, levels([list(range(4)), list(range(4, 90))]))
    parts = [seen(url, Share(rank, 2), limit=50) for rank in range(2)]
    assert [len(part) for part in parts] == [25, 25]
    assert sorted(parts[0] + parts[1]) == sorted(seen(url, limit=50))


def test_one_shard_of_a_store_without_buckets() -> None:
    MEMORY.pipe("/alone.tar", levels([list(range(20))])[0])
    try:
        assert sorted(seen("memory://alone.tar")) == list(range(20))
    finally:
        MEMORY.rm("/alone.tar")


@pytest.mark.parametrize("cached", [False, True])
def test_a_stream_repeats_whoever_reads(remote: str, cached: bool) -> None:
    url = put(remote, levels([list(range(shard, 60, 3)) for shard in range(3)]))
    order = seen(url, seed=2)
    assert sorted(order) == list(range(60)) != order
    assert seen(url, seed=2, workers=3) == order
    assert seen(url, seed=3) != order
    assert sorted(seen(remote)) == sorted(seen(f"{remote}/*.tar")) == list(range(60))
    stream = open_source(url).batches(EVEN, Reading(batch_size=25, workers=2, cached=cached))
    first = list(stream)
    assert [len(batch) for batch in first] == [25, 18, 17]
    assert (stream.count, stream.batch_count) == (None, None)
    if cached:
        MEMORY.rm("/bucket/shards/train-00.tar")
    assert all(torch.equal(a, b) for a, b in zip(first, stream, strict=True))
    next(iter(stream))  # and left alone: no thread stays


def test_a_shard_that_is_gone(remote: str) -> None:
    url = put(remote, levels([[1], [2], [3]]))
    stream = open_source(url).batches(EVEN, Reading(batch_size=1, workers=2))
    MEMORY.rm("/bucket/shards/train-01.tar")
    with pytest.raises(RemoteError, match=r"train-01\.tar: expected a file"):
        list(stream)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_labels_stay_with_their_images(tmp_path: Path, remote: str, far: bool, workers: int) -> None:
    contents = levels([range(100), range(100, 200)])
    contents[1] = contents[1].replace(grey(111), b"x" * len(grey(111)))
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.tar").write_bytes(content)
    source = open_source(put(remote, contents) if far else str(tmp_path))
    stream = labelled_batches(source, EVEN, Reading(batch_size=16, workers=workers, cached=True))
    for _ in range(2):
        pairs = [(batch[:, 0, 0, 0].mul(255).round().int(), labels) for batch, labels in stream]
        images, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        assert torch.equal(images.long(), labels)
        assert len(labels) == 199
    assert [what.name.rpartition("/")[2] for what in stream.skipped_samples] == ["1-111.png"]
    with pytest.raises(DataError, match="no class of a head with 100 outputs"):
        stream.check(labels, 100)


def test_labels_stay_with_batches_that_are_sent_ahead(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_ahead(batches: Iterator[torch.Tensor], device: torch.device) -> Iterator[torch.Tensor]:
        before, after = itertools.tee(batches)
        next(after)
        for batch in before:
            next(after, None)
            yield batch

    monkeypatch.setattr("ckpt_tools.data.shards.shard_stream.prefetch_to_device", one_ahead)
    source = open_source(put(remote, levels([range(50)])))
    for batch, labels in labelled_batches(source, EVEN, Reading(batch_size=7, device="cuda", workers=0)):
        assert torch.equal(batch[:, 0, 0, 0].mul(255).round().long(), labels)  # type: ignore[call-overload,index]


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize(
    ("label", "words"), [(None, r"KEY\.cls"), (b"cat", "found b'cat'"), (b"9" * 99, "found b'9999")]
)
def test_labels_that_are_none(
    tmp_path: Path, remote: str, far: bool, label: bytes | None, words: str
) -> None:
    content = packed([("a.png", grey(1))] + ([] if label is None else [("a.cls", label)]))
    (tmp_path / "a.tar").write_bytes(content)
    source = open_source(put(remote, [content]) if far else str(tmp_path))
    with pytest.raises(DataError, match=rf"\.tar/a\.png: .*{words}"):
        list(labelled_batches(source, EVEN, Reading(batch_size=1, workers=0)))
    with pytest.raises(UsageError, match="--class-map"):
        labelled_batches(source, EVEN, Reading(batch_size=1), class_map=object())  # type: ignore[arg-type]


def test_errors_are_ours(tmp_path: Path) -> None:
    (tmp_path / "a.tar").symlink_to(tmp_path / "gone")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/c.tar").symlink_to(tmp_path / "gone")
    (tmp_path / "d.tar").mkdir()
    for spec in (
        "a.tar",
        "b",
        "[a]*.tar",
        "d.tar",
        "{b,d.tar}",
        "**/c.tar",
        "{" * 900,
        "{1..2}{" * 300,
        "{a," * 2000 + "}" * 2000,
        "{" * 99 + "}" * 99,
    ):
        with pytest.raises(CkptToolsError):
            open_source(str(tmp_path / spec))


def test_a_network_scores_on_shards_as_on_an_array(tmp_path: Path) -> None:
    import nets
    from click.testing import CliRunner

    from ckpt_tools.cli import main

    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    classes = np.random.default_rng(1).integers(0, 5, 60)
    members: list[tuple[str, bytes]] = []
    for number, (image, label) in enumerate(zip(pixels, classes, strict=True)):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG")
        members += [(f"{number:03}.png", content.getvalue()), (f"{number:03}.cls", str(label).encode())]
    for number in range(2):
        (tmp_path / f"val-{number}.tar").write_bytes(packed(members[60 * number : 60 * number + 60]))
    np.savez(tmp_path / "val.npz", images=pixels, labels=classes)
    torch.save(nets.DenseNet().state_dict(), tmp_path / "model.pt")
    told = []
    for name in ("val-{0,1}.tar", "val.npz"):
        options = [
            "--arch",
            "nets:DenseNet",
            "--input-size",
            "3,8,8",
            "--batch-size",
            "16",
            "--device",
            "cpu",
            "--json",
        ]
        arguments = ["evaluate", str(tmp_path / "model.pt"), "--data", str(tmp_path / name), *options]
        told.append(json.loads(CliRunner().invoke(main, arguments, catch_exceptions=False).stdout))
    assert told[0]["metrics"].pop("kind") == "shards"
    assert told[1]["metrics"].pop("kind") == "array images"
    assert {**told[0]["metrics"], "data": ""} == {**told[1]["metrics"], "data": ""}
