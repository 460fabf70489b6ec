import gzip
import io
import os
import pickle

import numpy as np
import pytest
import torch

from ckpt_tools.contract import InputSpec
from ckpt_tools.data import open_source
from ckpt_tools.data.arrays.matlab import matlab_arrays
from ckpt_tools.data.sample_order import Reading, random_order
from ckpt_tools.errors import DataError

RNG = np.random.default_rng(0)


def read(source, channels, size):
    batches = torch.cat(
        list(source.batches(InputSpec((channels, size, size)), Reading(batch_size=3, workers=0)))
    )
    return (batches[random_order(source.count, limit=None, seed=0).argsort()] * 255).round().to(torch.uint8)


def cifar10(root, protocol):
    root.mkdir(parents=True)
    data = RNG.integers(0, 256, (10, 3072), dtype=np.uint8)
    for number in range(5):
        entry = {"data": data[2 * number : 2 * number + 2], "labels": [1, 2], "batch_label": f"{number}"}
        (root / f"data_batch_{number + 1}").write_bytes(pickle.dumps(entry, protocol))
    return torch.from_numpy(data.reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_from_root_or_inner_folder(tmp_path, protocol):
    expected = cifar10(tmp_path / "cifar-10-batches-py", protocol)
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        source = open_source(f"cifar10:{folder}")
        assert (source.kind, source.count, source.sample_shape) == ("dataset", 10, (3, 32, 32))
        assert torch.equal(read(source, 3, 32), expected)


def test_cifar10_needs_all_five_batches(tmp_path):
    cifar10(tmp_path / "cifar-10-batches-py", 2)
    (tmp_path / "cifar-10-batches-py/data_batch_4").unlink()
    with pytest.raises(DataError, match="data_batch_4"):
        open_source(f"cifar10:{tmp_path}")


def test_cifar100_as_python_2_wrote_it(tmp_path):
    data = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
    (tmp_path / "cifar-100-python").mkdir()
    # the original names numpy.core, and holds the pixels as a Python 2 str
    stream = io.BytesIO()
    pickle.dump({"data": data, "fine_labels": [0] * 4}, stream, protocol=2)
    old = stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "cifar-100-python/train").write_bytes(old)
    source = open_source(f"cifar100:{tmp_path}")
    assert torch.equal(read(source, 3, 32), torch.from_numpy(data.reshape(-1, 3, 32, 32)))


class Attack:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_is_never_executed(tmp_path):
    cifar10(tmp_path / "cifar-10-batches-py", 2)
    attack = Attack()
    attack.folder = str(tmp_path / "executed")
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps({"data": attack}))
    with pytest.raises(DataError, match=r"posix\.mkdir"):
        open_source(f"cifar10:{tmp_path}")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02}q", pickle.dumps([1]), pickle.dumps({"data": np.zeros((2, 5))})]
)
def test_damaged_cifar_is_refused(tmp_path, content):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python/train").write_bytes(content)
    with pytest.raises(DataError, match=r"cifar-100-python|cifar100"):
        open_source(f"cifar100:{tmp_path}")


def idx(images):
    return b"".join(int(v).to_bytes(4, "big") for v in (0x0803, *images.shape)) + images.tobytes()


@pytest.mark.parametrize("folder", ["MNIST/raw", "raw", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_plain_and_gzipped(tmp_path, folder, suffix):
    images = RNG.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    content = gzip.compress(idx(images)) if suffix else idx(images)
    (tmp_path / folder / f"train-images-idx3-ubyte{suffix}").write_bytes(content)
    source = open_source(f"mnist:{tmp_path}")
    assert (source.count, source.sample_shape) == (7, (1, 28, 28))
    assert torch.equal(read(source, 1, 28)[:, 0], torch.from_numpy(images))
    rgb = read(source, 3, 28)
    assert torch.equal(rgb[:, 2], torch.from_numpy(images))
    assert read(source, 3, 32).shape == (7, 3, 32, 32)


@pytest.mark.parametrize(
    "change",
    [lambda c: c[:-5], lambda c: b"\0\0\x08\x01" + c[4:], lambda c: c[:9], lambda c: c[:4] + b"\0" * 12],
)
def test_damaged_mnist_is_refused(tmp_path, change):
    content = change(idx(np.zeros((3, 28, 28), np.uint8)))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte|cannot be read"):
        open_source(f"mnist:{tmp_path}").batches(InputSpec((1, 28, 28)), Reading(batch_size=3))


def test_svhn(tmp_path):
    from scipy import io as matlab

    images = RNG.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    matlab.savemat(tmp_path / "train_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": np.ones((6, 1))})
    source = open_source(f"svhn:{tmp_path}")
    assert (source.count, source.sample_shape) == (6, (3, 32, 32))
    assert torch.equal(read(source, 3, 32), torch.from_numpy(images))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", "int16", "int64"])
def test_matlab_arrays_are_scipys(tmp_path, compressed, kind):
    from scipy import io as matlab

    arrays = {"X": RNG.integers(0, 256, (3, 4, 2, 5)).astype(kind), "long_name": np.arange(6).astype(kind)}
    matlab.savemat(tmp_path / "x.mat", {**arrays, "text": "abc", "cell": {"a": 1}}, do_compression=compressed)
    found = matlab_arrays(tmp_path / "x.mat")
    assert set(found) == set(arrays)
    for name, array in found.items():
        expected = matlab.loadmat(tmp_path / "x.mat")[name]
        assert (array.shape, array.kind) == (expected.shape, kind)
        assert np.array_equal(array.read(), expected)


def test_damaged_svhn_is_refused(tmp_path):
    from scipy import io as matlab

    (tmp_path / "train_32x32.mat").write_bytes(b"torn")
    with pytest.raises(DataError, match="cannot be read"):
        open_source(f"svhn:{tmp_path}")
    matlab.savemat(tmp_path / "train_32x32.mat", {"Z": np.zeros(3)})
    with pytest.raises(DataError, match="array X"):
        open_source(f"svhn:{tmp_path}")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "svhn"])
def test_missing_files_are_named_and_nothing_is_downloaded(tmp_path, name):
    with pytest.raises(DataError, match="Nothing is downloaded"):
        open_source(f"{name}:{tmp_path}")
    (tmp_path / "archive.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match="Unpack"):
        open_source(f"{name}:{tmp_path}")
