"""The demo's data, network and training. What the correction does to it is the demo command's test."""

import hashlib
from importlib.resources import files

import numpy as np
import pytest
import torch
from torch import nn

from ckpt_tools.demo.densenet import DenseLayer, digits_densenet
from ckpt_tools.demo.digits import load_digits
from ckpt_tools.demo.train import Score, score, train
from ckpt_tools.errors import UsageError

SHA256_OF_THE_VALUES = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


@pytest.fixture(scope="module")
def stored():
    with np.load(files("ckpt_tools.demo").joinpath("digits.npz")) as archive:
        return archive["images"], archive["labels"]


@pytest.fixture(scope="module")
def digits():
    return load_digits(seed=0)


@pytest.fixture(scope="module")
def trained(digits):
    seen = []
    model = train(digits, seed=1, epochs=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]
    return model


def test_bundled_values_are_the_published_ones(stored):
    images, labels = stored
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == (
        (1797, 8, 8),
        np.uint8,
        (1797,),
        np.uint8,
    )
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() == SHA256_OF_THE_VALUES


def test_bundled_values_are_those_of_scikit_learn(stored):
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    np.testing.assert_array_equal(stored[0], theirs.images)
    np.testing.assert_array_equal(stored[1], theirs.target)


def test_licence_note_names_source_and_licence():
    note = files("ckpt_tools.demo").joinpath("DIGITS.txt").read_text(encoding="utf-8")
    for word in ("Alpaydin", "Kaynak", "UCI", "scikit-learn", "CC BY 4.0"):
        assert word in note


def test_split_shapes_and_scale(digits):
    assert digits.train_images.shape == (600, 1, 8, 8)
    assert digits.test_images.shape == (1197, 1, 8, 8)
    everything = torch.cat([digits.train_images, digits.test_images])
    assert everything.dtype == torch.float32
    assert abs(everything.mean().item()) < 1e-3
    assert abs(everything.std().item() - 1) < 1e-3


def test_split_uses_every_image_once_with_its_label(digits, stored):
    def fingerprints(images, labels):
        return sorted((row.tobytes(), int(label)) for row, label in zip(images, labels, strict=True))

    images = torch.cat([digits.train_images, digits.test_images])
    labels = torch.cat([digits.train_labels, digits.test_labels])
    points = (images * 6.017 + 4.884).round().to(torch.uint8).squeeze(1).numpy()
    assert fingerprints(points, labels) == fingerprints(*stored)


def test_split_depends_on_the_seed_alone(digits):
    torch.manual_seed(123)
    again, other = load_digits(seed=0), load_digits(seed=1)
    assert torch.equal(digits.train_images, again.train_images)
    assert torch.equal(digits.test_labels, again.test_labels)
    assert not torch.equal(digits.train_labels, other.train_labels)


def test_training_repeats_to_the_bit(digits, trained):
    torch.manual_seed(99)  # the caller's random state must not matter
    again = train(digits, seed=1, epochs=1)
    for key, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_training_leaves_the_callers_state(digits):
    before, threads = torch.get_rng_state(), torch.get_num_threads()

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(digits, seed=0, epochs=2, progress=stop)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_one_epoch_learns_something(digits, trained):
    assert not trained.training
    result = score(trained, digits.train_images, digits.train_labels)
    untrained = score(digits_densenet(), digits.train_images, digits.train_labels)
    assert result.nll < untrained.nll


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"drop_rate": 1.0}, {"drop_rate": -0.1}])
def test_arguments_that_mean_nothing_are_refused(digits, wrong):
    with pytest.raises(UsageError, match="expected epochs"):
        train(digits, seed=0, **wrong)


def test_score_of_known_logits():
    images = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    expected = np.mean([np.log1p(np.exp(-2)), np.log1p(np.exp(-1)), np.log1p(np.exp(3)), np.log(2)])
    model = nn.Identity()
    assert score(model, images, labels) == Score(error=25.0, nll=pytest.approx(expected))
    assert model.training


def test_dropout_is_a_call_that_only_training_sees(digits):
    torch.manual_seed(0)
    layer = DenseLayer(channels=4, growth=4, bottleneck=2, drop_rate=0.5)
    model = digits_densenet(drop_rate=0.5)
    assert not [m for m in model.modules() if "Dropout" in type(m).__name__]
    features = [torch.randn(8, 4, 8, 8)]
    zeros = (layer.train()(features) == 0).float().mean().item()
    assert 0.4 < zeros < 0.6
    assert not (layer.eval()(features) == 0).any()
    images = digits.train_images[:16]
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_without_a_drop_rate_training_has_no_noise(digits):
    model = digits_densenet().train()
    assert torch.equal(model(digits.train_images[:16]), model(digits.train_images[:16]))


def test_factory_arguments():
    model = digits_densenet(0.2, num_classes=7, blocks=(2, 3), in_channels=3).eval()
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 7)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert names[0] == "features.norm0"
    assert "features.denseblock1.denselayer1.norm2" in names
    assert "features.transition1.norm" in names
    assert names[-1] == "features.norm5"


def test_network_is_torchvisions_at_every_step():
    torchvision = pytest.importorskip("torchvision")
    shape = {"blocks": (2, 3), "growth": 4, "stem": 8}
    ours = digits_densenet(0.2, num_classes=5, **shape, in_channels=3)
    theirs = torchvision.models.DenseNet(4, shape["blocks"], 8, bn_size=4, drop_rate=0.2, num_classes=5)
    # The one difference: 8×8 images need neither the 7×7 stem with stride 2 nor the pooling behind it.
    theirs.features.conv0 = nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False)
    theirs.features.pool0 = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 8, 8)
    for mode in (False, True):
        torch.manual_seed(5)
        expected = theirs.train(mode)(images)
        torch.manual_seed(5)
        assert torch.equal(ours.train(mode)(images), expected)
