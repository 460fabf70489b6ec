import pytest
import timm
import torch
import torchvision
from torch import nn

from ckpt_tools.errors import UsageError
from ckpt_tools.model.input_shape import infer_input_shape, needs_integer_inputs


def block(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout(0.2)
    )


def convolutional(*strides, channels=3, head=()):
    """A network of one block for each stride, which takes images of any size."""
    blocks = [block(channels if number == 0 else 4, 4, stride) for number, stride in enumerate(strides)]
    return nn.Sequential(*blocks, *(head or (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))))


def fixed_size(side):
    return convolutional(1, 2, head=(nn.Flatten(), nn.Linear(4 * ((side + 1) // 2) ** 2, 10)))


class Reordered(nn.Module):
    """The head is registered before the stem."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.stem = block(1, 4)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


class PooledByHand(nn.Module):
    """WRN for CIFAR: at other sizes the rows of the output are no samples."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = block(3, 4, 4), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(nn.functional.avg_pool2d(self.stem(x), 8).view(-1, 4))


class Detector(nn.Module):
    """Returns a dict for each image, with as many boxes as it finds."""

    def __init__(self):
        super().__init__()
        self.stem = convolutional(2, 2, 2, 2, head=[nn.Identity()])

    def forward(self, images):
        return [{"boxes": image[:, image[0] > 0].T} for image in self.stem(images)]


class DecidesByValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        return self.net(x) if x.sum().item() > 0 else -self.net(x)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    def forward(self, ids):
        return self.head(self.words(ids).mean(1))


class OneHot(nn.Module):
    """Needs integers without an embedding layer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(20, 2)

    def forward(self, ids):
        return self.head(self.head.weight.new_zeros(len(ids), 20).scatter(1, ids, 1.0))


class Conditional(nn.Module):
    """An embedding that does not take the input is registered first."""

    def __init__(self):
        super().__init__()
        self.classes, self.stem = nn.Embedding(10, 4), block(3, 4)

    def forward(self, x):
        return self.stem(x).mean((2, 3)) + self.classes.weight[0]


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, left, right, scale=1.0):
        return self.layer(left) + self.layer(right) * scale


class Recurrent(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 6, batch_first=batch_first), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Refusing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        raise ValueError("not today")


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: timm.create_model("resnet18"), (3, 224, 224)),
        (lambda: timm.create_model("resnet18", in_chans=1), (1, 224, 224)),
        (lambda: timm.create_model("efficientnet_b0"), (3, 224, 224)),
        (lambda: timm.create_model("inception_v3"), (3, 299, 299)),
        (lambda: timm.create_model("levit_128s"), (3, 224, 224)),
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=96), (3, 96, 96)),
        (torchvision.models.densenet121, (3, 224, 224)),
        (torchvision.models.mobilenet_v3_small, (3, 224, 224)),
        (torchvision.models.squeezenet1_1, (3, 224, 224)),
        (torchvision.models.video.r3d_18, (3, 16, 112, 112)),
    ],
    ids=lambda value: None if callable(value) else "×".join(map(str, value)),
)
def test_models_of_libraries(model, shape):
    with torch.device("meta"):
        assert infer_input_shape(model()) == shape


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8)), (64,)),
        (nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.AdaptiveAvgPool1d(1)), (4, 224)),
        (nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 98, 2)), (4, 100)),
        (nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2)), (1, 16, 112, 112)),
        (nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 30**3, 2)), (1, 32, 32, 32)),
        (Recurrent(batch_first=True), (32, 6)),
        (Reordered(), (1, 32, 32)),
        (PooledByHand(), (3, 32, 32)),
        (DecidesByValues(), (12,)),
        (Detector(), (3, 224, 224)),
        (Conditional(), (3, 32, 32)),
        (convolutional(1, 2, 2), (3, 32, 32)),
        (convolutional(2, 2, 2, channels=6), (6, 32, 32)),
        (
            nn.Sequential(*convolutional(2, 2, 2)[:3], nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
            (3, 224, 224),
        ),
        (convolutional(2, 2, 2, 2), (3, 224, 224)),
        (convolutional(2, 2, 2, 2, 2), (3, 224, 224)),
        *((fixed_size(side), (3, side, side)) for side in (8, 28, 32, 64, 96, 299)),
    ],
)
def test_bare_modules(model, shape):
    assert infer_input_shape(model) == shape


def test_wrappers_and_half_precision():
    assert infer_input_shape(nn.DataParallel(fixed_size(28))) == (3, 28, 28)
    assert infer_input_shape(torch.compile(fixed_size(28))) == (3, 28, 28)
    assert infer_input_shape(fixed_size(28).to(torch.bfloat16)) == (3, 28, 28)
    assert infer_input_shape(fixed_size(28).double()) == (3, 28, 28)


def test_the_example_of_a_lightning_module():
    model = convolutional(1, 2)
    model.example_input_array = torch.zeros(1, 3, 20, 30)
    assert infer_input_shape(model) == (3, 20, 30)
    model.example_input_array = (torch.zeros(4, 3, 20, 20),)
    assert infer_input_shape(model) == (3, 20, 20)
    for example in (torch.zeros(1, 5, dtype=torch.long), {"a": torch.zeros(1, 3), "b": torch.zeros(1, 3)}):
        model.example_input_array = example
        with pytest.raises(UsageError, match=r"example_input_array.*needs real data"):
            infer_input_shape(model)


def test_an_example_that_does_not_fit_counts_for_nothing():
    model = fixed_size(28)
    model.pretrained_cfg = {"input_size": (3, 224, 224)}
    assert infer_input_shape(model) == (3, 28, 28)
    model.pretrained_cfg = {"input_size": "large"}
    assert infer_input_shape(model) == (3, 28, 28)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Text(), "Text: .*token ids.*needs real data"),
        (OneHot(), "OneHot: .*needs real data"),
        (TwoInputs(), "TwoInputs: .*one input.*needs left, right.*real data"),
        (Refusing(), r"Refusing: .*with \(3,\), ValueError: not today\. Give .*input_shape=\(3, 224, 224\)"),
        (Recurrent(batch_first=False), "Recurrent: .*input_shape="),
        (nn.Sequential(nn.BatchNorm1d(3)), "no linear layer or convolution.*input_shape="),
    ],
)
def test_models_whose_input_cannot_be_made_up(model, message):
    with pytest.raises(UsageError, match=message):
        infer_input_shape(model)


def test_needs_integer_inputs():
    assert needs_integer_inputs(Text())
    assert needs_integer_inputs(OneHot())
    assert needs_integer_inputs(nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 2)))
    for model in (Conditional(), fixed_size(28), DecidesByValues(), nn.Linear(16, 2), Refusing()):
        assert not needs_integer_inputs(model)


def test_the_model_stays_as_it_was():
    torch.manual_seed(0)
    model = convolutional(1, 2).train()
    model[0][1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    infer_input_shape(model)
    assert model.training
    assert not model[0][1].training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)
