"""Batches on another device: the constants follow them; with CUDA, the same values arrive."""

import numpy as np
import pytest
import torch
from PIL import Image

from ckpt_tools.contract import InputSpec
from ckpt_tools.data import open_source
from ckpt_tools.data.device_transfer import prefetch_to_device
from ckpt_tools.data.images.transforms import PixelScale
from ckpt_tools.data.sample_order import Reading

SPEC = InputSpec((3, 6, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
RNG = np.random.default_rng(0)
PIXELS = torch.from_numpy(RNG.integers(0, 256, (5, 3, 6, 8), dtype=np.uint8))

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_scaling_is_one_formula_in_every_layout(layout):
    pixels = PIXELS.contiguous(memory_format=layout)
    mean, std = (torch.tensor(values)[:, None, None] for values in (SPEC.mean, SPEC.std))
    scaled = PixelScale(SPEC)(pixels)
    assert scaled.is_contiguous(memory_format=layout)
    torch.testing.assert_close(scaled, (PIXELS / 255 - mean) / std)
    assert torch.equal(scaled, PixelScale(SPEC)(PIXELS))


def test_constants_follow_the_device():
    scale = PixelScale(SPEC)
    assert scale(PIXELS.to("meta")).device.type == "meta"
    assert scale(PIXELS).device.type == "cpu"


def test_the_cpu_needs_no_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", None)
    np.save(tmp_path / "a.npy", PIXELS.numpy())
    batch = next(
        iter(open_source(str(tmp_path / "a.npy")).batches(SPEC, Reading(batch_size=5, device="cpu")))
    )
    assert batch.device.type == "cpu"


@pytest.mark.gpu
@needs_cuda
def test_batches_arrive_as_they_were_in_order():
    batches = [RNG.integers(0, 256, (n, 3, 40, 50), dtype=np.uint8) for n in (9, 1, 30, 30, 30, 2)]
    pixels = [torch.from_numpy(batch).contiguous(memory_format=torch.channels_last) for batch in batches]
    arrived = prefetch_to_device(pixels, torch.device("cuda"))
    for here, there in zip(pixels, arrived, strict=True):
        busy = torch.randn(2000, 2000, device="cuda")
        busy @ busy  # work under way on the stream that uses the batch
        assert there.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(there.cpu(), here)
    assert list(prefetch_to_device([], torch.device("cuda"))) == []


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("cached", [False, True])
def test_every_pass_on_cuda_is_that_on_the_cpu(tmp_path, cached):
    for number in range(40):
        noise = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    source = open_source(str(tmp_path))
    here = source.batches(SPEC, Reading(batch_size=7, workers=2))
    there = source.batches(SPEC, Reading(batch_size=7, workers=2, cached=cached, device="cuda"))
    for _ in range(2):
        for one, other in zip(here, there, strict=True):
            assert other.device.type == "cuda"
            torch.testing.assert_close(one, other.cpu())
