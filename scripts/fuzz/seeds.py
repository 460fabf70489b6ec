"""Write small valid files for every reader, by the libraries that write them in earnest."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import pickle
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import format_files as formats
import malicious
import malicious_files
import numpy as np
import report_facts
import torch
from PIL import Image
from safetensors.torch import save_file

__all__ = ["Seed", "seeds"]

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)


@dataclass(frozen=True)
class Seed:
    """The files of a folder by their names, and the one that the reader gets ("": the folder)."""

    files: Mapping[str, bytes]
    entry: str = ""


def seeds(reader: str) -> list[Seed]:
    """The seeds of a reader, the same in every process."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as folder:
        return list(_SEEDS[reader](Path(folder)))


def _of(path: Path) -> Seed:
    """A file, or a folder with all that is in it."""
    if path.is_file():
        return Seed({path.name: path.read_bytes()}, path.name)
    return Seed({str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()})


def _write_with(*makers: formats.Maker) -> Callable[[Path], Iterator[Seed]]:
    def make(folder: Path) -> Iterator[Seed]:
        for maker in makers:
            yield _of(maker(formats.Net(), folder))

    return make


def _archives(folder: Path) -> Iterator[Seed]:
    yield from _write_with(
        formats.state_dict, formats.whole_module, formats.data_parallel, formats.ultralytics,
        formats.deepspeed, formats.mmcv, formats.averaged_model, formats.torchvision_reference,
    )(folder)  # fmt: skip
    odd = {
        "t": torch.ones(3, 2).t(),
        "h": torch.ones(2).half(),
        "e": torch.empty(0, 2),
        "c": torch.ones(2, dtype=torch.complex64),
    }
    torch.save({"ema": odd, "model": odd, "args": {"lr": 1, (1, 2): {3}}}, folder / "odd.pt")
    yield _of(folder / "odd.pt")


def _legacy(folder: Path) -> Iterator[Seed]:
    yield from _write_with(formats.whole_module_legacy)(folder)
    state = formats.Net().state_dict()
    torch.save({"state_dict": state, "epoch": 3}, folder / "x.pt", _use_new_zipfile_serialization=False)
    yield _of(folder / "x.pt")


def _tar(folder: Path) -> Iterator[Seed]:
    formats.old_tar(folder / "x.pt", {"w": torch.randn(3, 4), "b": torch.randn(3)})
    yield _of(folder / "x.pt")


def _pickles(folder: Path) -> Iterator[Seed]:
    yield from _write_with(formats.pickled_module, formats.detectron2)(folder)
    arrays = {"model": {"w": np.ones((2, 3), "f4"), "b": np.ones(2)}, "epoch": np.int64(3)}
    for protocol in range(6):
        yield Seed({"x.pkl": pickle.dumps(arrays, protocol)}, "x.pkl")


def _malicious(folder: Path) -> Iterator[Seed]:
    for make in (*malicious.PICKLES.values(), *malicious_files.FILES.values()):
        content = make()
        if len(content) < 50_000:
            yield Seed({"x.pt": content}, "x.pt")
    for make in malicious.TENSORS.values():
        yield Seed({"x.pt": malicious_files.as_archive(make())}, "x.pt")


def _safetensors(folder: Path) -> Iterator[Seed]:
    state = formats.Net().state_dict()
    provenance = json.dumps({"expect": "variance", "source": "x", "weights": "", "earlier": {"a": 1}})
    for metadata in (None, {"format": "pt"}, {"format": "pt", "ckpt_tools": provenance}):
        save_file(state, folder / "x.safetensors", metadata)
        yield _of(folder / "x.safetensors")
    save_file(
        {"a": torch.empty(0, 3), "b": torch.ones(2).bfloat16(), "c": torch.tensor(1)},
        folder / "x.safetensors",
    )
    yield _of(folder / "x.safetensors")


def _shards(folder: Path) -> Iterator[Seed]:
    state = formats.Net().state_dict()
    for suffix, index in (
        ("safetensors", "model.safetensors.index.json"),
        ("bin", "pytorch_model.bin.index.json"),
    ):
        here = folder / suffix
        here.mkdir()
        shard_of = {key: f"model-{i % 2}.{suffix}" for i, key in enumerate(state)}
        for name in set(shard_of.values()):
            part = {key: state[key] for key in state if shard_of[key] == name}
            torch.save(part, here / name) if suffix == "bin" else save_file(part, here / name)
        (here / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shard_of}))
        yield _of(here)


def _hub(folder: Path) -> Iterator[Seed]:
    save_file(formats.Net().state_dict(), folder / "model.safetensors")
    for words in _WORDS:
        if "config" in words:
            (folder / "config.json").write_text(json.dumps(words["config"]))
            (folder / "preprocessor_config.json").write_text(json.dumps(words.get("preprocessor", {})))
            yield _of(folder)


def _folder(folder: Path) -> Iterator[Seed]:
    """Checkpoints of several kinds side by side."""
    (folder / "a").mkdir()
    torch.save(formats.Net().state_dict(), folder / "a" / "x.pt")
    save_file({"w": torch.ones(2)}, folder / "y.safetensors", {"ckpt_tools": "{}"})
    files = dict(_of(folder).files)
    for seed in _hub(folder / "a"):
        files |= {f"hub/{name}": content for name, content in seed.files.items()}
    yield Seed(files)


# What files may ask of a constructor, and what they may not.
_ARGUMENTS = [
    {
        "depth": 12,
        "embed_dim": 192,
        "num_heads": 3,
        "mlp_ratio": 4.0,
        "act_layer": "silu",
        "img_size": [64, 64],
    },
    {"checkpoint_path": "elsewhere.pt", "pretrained_cfg": {"file": "elsewhere.pt"}, "depth": 10**7},
    {
        "block_args": {"attn_layer": "package.module:Class"},
        "layers": [2, 2, 2, 10**6],
        "norm_layer": "os.system",
    },
]
_UPERNET = {
    "architectures": ["UperNetForSemanticSegmentation"],
    "model_type": "upernet",
    "hidden_size": 8,
    "backbone_config": {
        "model_type": "resnet",
        "hidden_sizes": [4, 4, 4, 8],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage1", "stage2"],
        "auto_map": {"AutoBackbone": "theirs.Net"},
        "_name_or_path": "/tmp",
    },
    "transformers_version": "5",
}
_TIMM = {
    "architecture": "resnet18",
    "num_classes": 5,
    "pretrained_cfg": {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
    },
    "model_args": {"drop_rate": 0.1},
}
_RESNET = {
    "architectures": ["ResNetForImageClassification"],
    "model_type": "resnet",
    "depths": [1, 1],
    "hidden_sizes": [4, 8],
    "embedding_size": 4,
    "id2label": {"0": "a", "1": "b"},
    "num_channels": 3,
    "transformers_version": "4.50",
}
_PROCESSOR = {
    "image_processor_type": "ConvNextImageProcessor",
    "size": {"shortest_edge": 32},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "crop_pct": 0.9,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
}
_SCRIPT = {
    **{
        "model": "resnet18",
        "drop": 0.2,
        "drop_path": 0.1,
        "num_classes": 5,
        "input_size": [3, 32, 32],
        "gp": "avg",
    },
    **{"mean": [0.5, 0.5, 0.5], "split_bn": False, "aug_splits": 0},
}
_REFERENCE = {
    "model": "densenet121",
    "val_resize_size": 256,
    "val_crop_size": 224,
    "interpolation": "bilinear",
}
_MODULE = {"class": "torchvision.models.resnet.ResNet", "rates": {"": {"p": 0.5}}}
_WORDS: tuple[dict[str, object], ...] = (
    {"config": _TIMM},
    {"config": _RESNET, "preprocessor": _PROCESSOR},
    {"args": _SCRIPT, "arch": "resnet18"},
    {"args": _REFERENCE, "epoch": 1},
    {
        "hyper_parameters": {
            "model_name": "timm:resnet18",
            "drop_rate": 0.1,
            "model_kwargs": {"num_classes": 3},
        }
    },
    {"arch": "resnet50", "best_acc1": 0.5, "module": _MODULE},
)


def _words(folder: Path) -> Iterator[Seed]:
    recorded = [{"arch": "vit_tiny_patch16_224", "model_kwargs": arguments} for arguments in _ARGUMENTS]
    for words in (*_WORDS, *recorded, {"config": _UPERNET}):
        yield Seed({"words.json": json.dumps(words).encode()}, "words.json")


def _npy(folder: Path) -> Iterator[Seed]:
    for array in (
        PIXELS,
        PIXELS.transpose(0, 2, 3, 1),
        RNG.normal(size=(5, 4)),
        np.asfortranarray(RNG.normal(size=(5, 4))),
    ):
        target = io.BytesIO()
        np.save(target, array)
        yield Seed({"a.npy": target.getvalue()}, "a.npy")
    target = io.BytesIO()
    np.lib.format.write_array(target, PIXELS, version=(2, 0))
    yield Seed({"a.npy": target.getvalue()}, "a.npy")
    target = io.BytesIO()
    np.save(target, np.array([[None], [1]], object), allow_pickle=True)
    yield Seed({"a.npy": target.getvalue()}, "a.npy")


def _npz(folder: Path) -> Iterator[Seed]:
    for save in (np.savez, np.savez_compressed):
        for arrays in (
            {"images": PIXELS, "labels": np.arange(6)},
            {"x": RNG.normal(size=(5, 4)), "y": np.arange(5)},
        ):
            target = io.BytesIO()
            save(target, **arrays)
            yield Seed({"a.npz": target.getvalue()}, "a.npz")
    target = io.BytesIO()
    np.savez(target, images=PIXELS, objects=np.array([None, {}], object))
    yield Seed({"a.npz": target.getvalue()}, "a.npz")


def _array_pt(folder: Path) -> Iterator[Seed]:
    pixels, labels = torch.from_numpy(PIXELS), torch.arange(6)
    contents = (
        pixels,
        (pixels, labels),
        {"images": pixels, "labels": labels},
        [pixels, pixels],
        {"x": torch.randn(5, 4)},
    )
    for content in contents:
        torch.save(content, folder / "a.pt")
        yield _of(folder / "a.pt")
    torch.save(contents[2], folder / "a.pt", _use_new_zipfile_serialization=False)
    yield _of(folder / "a.pt")


def _array_safetensors(folder: Path) -> Iterator[Seed]:
    save_file({"images": torch.from_numpy(PIXELS), "labels": torch.arange(6)}, folder / "a.safetensors")
    yield _of(folder / "a.safetensors")
    save_file({"x": torch.randn(5, 4).half()}, folder / "a.safetensors")
    yield _of(folder / "a.safetensors")


def _cifar(name: str, files: Iterable[str], key: str) -> Callable[[Path], Iterator[Seed]]:
    def make(folder: Path) -> Iterator[Seed]:
        for protocol in (2, 4, 5):
            entry = {"data": RNG.integers(0, 256, (2, 3072), dtype=np.uint8), key: [1, 2], "batch_label": "x"}
            yield Seed({f"{name}/{file}": pickle.dumps(entry, protocol) for file in files})

    return make


def _mnist(folder: Path) -> Iterator[Seed]:
    head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (4, 28, 28))
    images = head + RNG.integers(0, 256, 4 * 28 * 28, dtype=np.uint8).tobytes()
    labels = b"\0\0\x08\x01" + (4).to_bytes(4, "big") + bytes(4)
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    yield Seed(dict(zip(names, (images, labels), strict=True)))
    yield Seed({f"{name}.gz": gzip.compress(raw) for name, raw in zip(names, (images, labels), strict=True)})


def _svhn(folder: Path) -> Iterator[Seed]:
    from scipy import io as matlab

    for compressed in (False, True):
        content = {"X": RNG.integers(0, 256, (32, 32, 3, 2), dtype=np.uint8), "y": np.ones((2, 1))}
        matlab.savemat(folder / "train_32x32.mat", content, do_compression=compressed)
        yield Seed(_of(folder / "train_32x32.mat").files)


def _images(folder: Path) -> Iterator[Seed]:
    colour = Image.fromarray(RNG.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    many = {"save_all": True, "append_images": [colour.convert("P"), colour.convert("L").convert("P")]}
    kinds: tuple[tuple[str, str, dict[str, object]], ...] = (
        *(("jpg", mode, {}) for mode in ("RGB", "L", "CMYK")),
        ("jpg", "RGB", {"progressive": True}),
        *(("png", mode, {}) for mode in ("RGB", "RGBA", "P", "L", "1", "I;16")),
        *(("gif", "P", {}), ("gif", "P", many)),
        *(("webp", "RGB", {}), ("webp", "RGB", {"save_all": True, "append_images": [colour]})),
        *(("tif", "RGB", {"compression": how}) for how in ("raw", "tiff_lzw", "tiff_deflate", "jpeg")),
        *(("bmp", "RGB", {}), ("ppm", "RGB", {}), ("pgm", "L", {})),
        *((name, "RGB", {}) for name in ("avif", "tga", "pcx", "qoi", "dds", "ico", "icns", "sgi")),
    )
    for suffix, mode, options in kinds:
        target = io.BytesIO()
        formats_ = {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}
        colour.convert(mode).save(target, formats_.get(suffix, suffix.upper()), **options)
        yield Seed({f"class/a.{suffix}": target.getvalue()})
    target = io.BytesIO()
    colour.save(target, "JPEG2000")
    yield Seed({"class/a.jpg": target.getvalue()})


def _tars(folder: Path) -> Iterator[Seed]:
    """Ten samples each, as every way of writing a tar has them; some names are too long for a header."""
    images = [
        content
        for seed in _images(folder)
        for name, content in seed.files.items()
        if name.endswith((".jpg", ".png"))
    ]
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w", format=kind) as archive:
            for number, image in enumerate(images):
                key = f"{'deep/' * (30 * (kind != tarfile.USTAR_FORMAT and number % 3 == 0))}{number:04}"
                for name, content in (
                    (f"{key}.jpg", image),
                    (f"{key}.cls", b"%d" % number),
                    (f"{key}.json", b"{}"),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        yield Seed({"a.tar": target.getvalue()}, "a.tar")


def _class_map(folder: Path) -> Iterator[Seed]:
    yield Seed({"map.json": json.dumps({"cat": 0, "dog": 1}).encode()}, "map.json")
    yield Seed({"map.json": json.dumps(["cat", "dog"]).encode()}, "map.json")
    yield Seed({"map.txt": b"cat\ndog\n"}, "map.txt")


def _label_file(folder: Path) -> Iterator[Seed]:
    yield Seed({"labels.csv": b"name,label\na.png,0\nsub/b.png,1\n"}, "labels.csv")
    yield Seed({"labels.csv": b",Image,Class,split\n0,a,cat,val\n1,b.png,dog,val\n"}, "labels.csv")
    yield Seed({"labels.txt": b"a.png 0\nsub/b.png 1\n"}, "labels.txt")
    yield Seed({"labels.txt": b"1\n0\n"}, "labels.txt")


# What could lead out of a folder, or to a file that is none, if a store lists it; the others are
# names as they come.
_LISTED = (
    *("{}", "0/{}", "a b/é/{}", "run 10:00/{}", "{}/{}", ".hidden/{}", "..{}", "~/{}", "%2e%2e/{}", "-{}"),
    *(
        "../{}",
        "../../secret/{}",
        "../secret/{}",
        "a/../../../secret/{}",
        "/tmp/{}",
        "//tmp/{}",
        "./{}",
        "a//{}",
    ),
    *(
        "..\\{}",
        "C:{}",
        "C:/{}",
        "a/C:/{}",
        "nul/{}",
        "con.{}",
        "{}.",
        "{} ",
        "\0{}",
        "\n{}",
        "\x1b[2J{}",
        "\u202e{}",
    ),
    *(
        "\ud800{}",
        "\udcff{}",
        "a::{}",
        "file://{}",
        "a::file:///tmp/{}",
        "a?{}",
        "a#{}",
        "a*{}",
        "[a]{}",
        "{{a}}{}",
    ),
    *("x" * 300 + "{}", "d/" * 2000 + "{}", "../" * 40 + "tmp/{}"),
)
_ANY = (
    "a.pt",
    "model.safetensors",
    "model.safetensors.index.json",
    ".metadata",
    "__0_0.distcp",
    "1/i.png",
    "s.tar",
)


def _listing(folder: Path) -> Iterator[Seed]:
    """What a store lists, and a file of each kind for what it holds under all of the names."""
    state = formats.Net().state_dict()
    torch.save(state, folder / "any.pt")
    save_file(state, folder / "any.safetensors")
    names = {
        key: "../../secret/any.safetensors" if number % 2 else "a.safetensors"
        for number, key in enumerate(state)
    }
    (folder / "any.json").write_text(json.dumps({"weight_map": names}))
    Image.fromarray(PIXELS[0].transpose(1, 2, 0)).save(folder / "any.png")
    with tarfile.open(folder / "any.tar", "w") as archive:
        archive.add(folder / "any.png", "1.png")
    files = _of(folder).files
    sizes = {Path(name).suffix: len(content) for name, content in files.items()}
    for pattern, good in itertools.product(_LISTED, _ANY):
        listed = [good, pattern.format(good, good)]
        entries = [
            {"name": f"vault/runs/{it}", "size": sizes.get(Path(it).suffix), "type": "file"} for it in listed
        ]
        entries.append({"name": f"vault/{pattern.format('x', 'x')}", "size": None, "type": "directory"})
        text = json.dumps(entries).encode()
        yield Seed({**files, "listing.json": text, "secret/any.safetensors": b"secret"}, "listing.json")


def _manifest(folder: Path) -> Iterator[Seed]:
    hashes = {"source_sha256": "a" * 64, "settings": "b" * 16, "output_sha256": "c" * 64, "output_bytes": 9}
    beside = {"exit_code": 0, "metrics": None, "replaced": None, **hashes}
    lines = [json.dumps({**record, **beside}).encode() for record in report_facts.records()]
    yield Seed({"ckpt-fix.jsonl": b"\n".join(lines[:2])}, "ckpt-fix.jsonl")
    yield Seed({"ckpt-fix.jsonl": b"\n".join(lines[:3])[:-9]}, "ckpt-fix.jsonl")  # the run was killed
    yield Seed({"ckpt-fix.jsonl": b"\n".join([lines[0], lines[6], lines[10]])}, "ckpt-fix.jsonl")


_SEEDS: Mapping[str, Callable[[Path], Iterator[Seed]]] = {
    "torch.save": _archives,
    "legacy": _legacy,
    "tar": _tar,
    "pickle": _pickles,
    "malicious": _malicious,
    "TorchScript": _write_with(formats.scripted, formats.traced, formats.frozen),
    "export": _write_with(formats.exported, formats.exported_2_6, formats.exported_2_8),
    "distributed": _write_with(formats.distributed, formats.distributed_flat, formats.distributed_two_ranks),
    "ranks": _write_with(formats.hugging_face_two_ranks, formats.distributed_hugging_face),
    "safetensors": _safetensors,
    "shards": _shards,
    "hub": _hub,
    "folder": _folder,
    "npy": _npy,
    "npz": _npz,
    "array .pt": _array_pt,
    "array .safetensors": _array_safetensors,
    "cifar10": _cifar("cifar-10-batches-py", [f"data_batch_{n}" for n in range(1, 6)], "labels"),
    "cifar100": _cifar("cifar-100-python", ["train"], "fine_labels"),
    "mnist": _mnist,
    "svhn": _svhn,
    "images": _images,
    "tars": _tars,
    "streamed tars": _tars,
    "streamed images": _images,
    "class map": _class_map,
    "label file": _label_file,
    "listing": _listing,
    "manifest": _manifest,
    "words": _words,
}
