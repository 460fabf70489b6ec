"""Tiny nets of many fields, with dropout and BatchNorm where the field has them, and a batch for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Any


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Conformer(nn.Module):
    """Speech: half a feed-forward step, attention, and a convolution module with BatchNorm1d."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, width)
        )
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.point, self.depth = (
            nn.Conv1d(width, 2 * width, 1),
            nn.Conv1d(width, width, 5, padding=2, groups=width),
        )
        self.norm, self.out = nn.BatchNorm1d(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.feed(x)
        x = x + self.attention(x, x, x)[0]
        inner = F.glu(self.point(x.transpose(1, 2)), 1)
        inner = F.silu(self.norm(self.depth(inner)))
        return self.out(x + inner.transpose(1, 2))


class CRNN(nn.Module):
    """OCR: convolutions, a recurrent layer over columns, BN over its features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.2),
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        )  # fmt: skip
        self.rnn, self.norm, self.head = (
            nn.GRU(32, 6, bidirectional=True, batch_first=True),
            nn.BatchNorm1d(12),
            nn.Linear(12, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        columns = self.features(x).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.norm(self.rnn(columns)[0].transpose(1, 2)).transpose(1, 2))


def double_conv(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU())


class UNet(nn.Module):
    """Segmentation: dropout at the bottom only, skip connections around it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = (
            double_conv(2, 6),
            nn.Sequential(nn.MaxPool2d(2), double_conv(6, 8), nn.Dropout(0.4)),
        )
        self.up, self.merge, self.head = (
            nn.ConvTranspose2d(8, 6, 2, 2),
            double_conv(12, 6),
            nn.Conv2d(6, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.head(self.merge(torch.cat([skip, self.up(self.bottom(skip))], 1)))


class PointNet(nn.Module):
    """Point clouds: a learnt transform, shared layers on points, max pooling, a head with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Sequential(
            nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveMaxPool1d(1)
        )
        self.matrix, self.points = (
            nn.Linear(8, 9),
            nn.Sequential(nn.Conv1d(3, 12, 1), nn.BatchNorm1d(12), nn.ReLU()),
        )
        self.head = nn.Sequential(
            nn.Linear(12, 10), nn.Dropout(0.3), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)
        )

    def forward(self, points: Tensor) -> Tensor:
        matrix = self.matrix(self.transform(points).squeeze(2)).view(-1, 3, 3) + torch.eye(3)
        return self.head(self.points(torch.bmm(matrix, points)).amax(2))


class GhostNorm(nn.Module):
    """Virtual batches (Hoffer et al. 2017)."""

    def __init__(self, features: int, size: int = 32) -> None:
        super().__init__()
        self.norm, self.size = nn.BatchNorm1d(features), size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in x.chunk(math.ceil(len(x) / self.size))])


class TabNet(nn.Module):
    """Tables: attentive steps with shared gated blocks on ghost batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.shared = nn.BatchNorm1d(6), nn.Linear(6, 16)
        self.norms, self.masks = (
            nn.ModuleList(GhostNorm(16) for _ in range(2)),
            nn.ModuleList(nn.Linear(8, 6) for _ in range(2)),
        )
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        mask, total = torch.ones_like(x), torch.zeros(len(x), 8)
        for norm, attend in zip(self.norms, self.masks, strict=True):
            step = self.drop(F.glu(norm(self.shared(mask * x)), 1))
            mask, total = mask * attend(step).softmax(1), total + step
        return self.head(total)


class R2Plus1D(nn.Module):
    """Video: factorised convolutions, BatchNorm3d, dropout between the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.norm1 = nn.Conv3d(2, 6, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(6)
        self.time, self.norm2 = nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(6)
        self.drop, self.head = nn.Dropout3d(0.3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.space(x)))
        return self.head(F.relu(self.norm2(self.time(self.drop(x)))).mean((2, 3, 4)))


class GCN(nn.Module):
    """Graphs in mini-batches: nodes of all graphs in one tensor, edges beside them, mean over a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 8)])
        self.norms, self.head = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(2)), nn.Linear(8, 2)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, graphs: int) -> Tensor:
        source, target = edge_index
        for layer, norm in zip(self.layers, self.norms, strict=True):
            sums = torch.zeros_like(x).index_add(0, target, x[source])
            x = F.dropout(F.relu(norm(layer(x + 0.5 * sums))), 0.3, self.training)
        return self.head(torch.zeros(graphs, 8).index_add(0, batch, x))


def graph_batch(graphs: int = 8, nodes: int = 12) -> dict[str, Any]:
    first = torch.arange(graphs).repeat_interleave(nodes) * nodes
    ring = torch.arange(graphs * nodes) - first
    edges = [torch.stack([first + ring, first + (ring + step) % nodes]) for step in (1, 3)]
    batch = torch.arange(graphs).repeat_interleave(nodes)
    return {
        "x": normal(graphs * nodes, 5),
        "edge_index": torch.cat(edges, 1),
        "batch": batch,
        "graphs": graphs,
    }


class GAT(nn.Module):
    """Graph attention on a dense adjacency, with dropout of attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.score, self.norm, self.head = (
            nn.Linear(5, 8),
            nn.Linear(8, 1),
            nn.BatchNorm1d(8),
            nn.Linear(8, 2),
        )
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        value = self.value(x)
        scores = F.leaky_relu(self.score(value) + self.score(value).transpose(1, 2), 0.2)
        mixed = self.drop(scores.softmax(2)) @ value
        return self.head(self.norm(mixed.transpose(1, 2)).transpose(1, 2).mean(1))


def discriminator() -> nn.Sequential:
    """GAN: strided convolutions, LeakyReLU, Dropout2d in front of BN (as in many DCGAN tutorials)."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 2, 1), nn.LeakyReLU(0.2), nn.Dropout2d(0.25),
        nn.Conv2d(6, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Dropout2d(0.25), nn.BatchNorm2d(8, 0.8),
        nn.Flatten(), nn.Linear(32, 1), nn.Flatten(0),
    )  # fmt: skip


def generator() -> nn.Sequential:
    """GAN: transposed convolutions, dropout in place of noise (pix2pix)."""
    return nn.Sequential(
        nn.Linear(6, 32), nn.Unflatten(1, (8, 2, 2)), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.Dropout(0.5), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip


class Siamese(nn.Module):
    """Verification: both inputs of a pair run through one encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(6, 10),
            nn.Dropout(0.3),
            nn.BatchNorm1d(10),
            nn.ReLU(),
            nn.Linear(10, 6),
            nn.BatchNorm1d(6),
        )

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.encoder(left) - self.encoder(right)).square().sum(1)


class LSTMNet(nn.Module):
    """Time series: dropout between recurrent layers, BN over the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rnn = nn.BatchNorm1d(4), nn.LSTM(4, 8, 2, dropout=0.3, batch_first=True)
        self.last, self.head = nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.last(self.rnn(x)[0][:, -1]))


class TSM(nn.Module):
    """Video: frames are folded into the batch, channels are shifted in time (Lin et al. 2019)."""

    def __init__(self, frames: int = 4) -> None:
        super().__init__()
        self.frames, self.conv1, self.conv2 = frames, double_conv(2, 8), double_conv(8, 8)
        self.drop, self.head = nn.Dropout(0.4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.conv1(x.flatten(0, 1)))
        video = x.unflatten(0, (-1, self.frames))
        shifted = torch.cat([video[:, :, :2].roll(1, 1), video[:, :, 2:]], 2)
        x = self.head(self.conv2(shifted.flatten(0, 1)).mean((2, 3)))
        return x.unflatten(0, (-1, self.frames)).mean(1)


class WaveNet(nn.Module):
    """Audio: gated, dilated, causal convolutions with residual and skip paths."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(3))
        self.norms, self.drop = nn.ModuleList(nn.BatchNorm1d(2 * width) for _ in range(3)), nn.Dropout(0.2)
        self.head = nn.Conv1d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.first(x), []
        for level, (gate, norm) in enumerate(zip(self.gates, self.norms, strict=True)):
            inner = F.glu(norm(gate(F.pad(x, (2**level, 0)))), 1)
            skips.append(inner)
            x = x + self.drop(inner)
        return self.head(torch.stack(skips).sum(0).relu())


def autoencoder() -> nn.Sequential:
    """Denoising autoencoder: dropout on the input itself."""
    return nn.Sequential(
        nn.Dropout(0.3), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ELU(), nn.Linear(8, 3), nn.BatchNorm1d(3),
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ELU(), nn.Linear(8, 12),
    )  # fmt: skip


class VAE(nn.Module):
    """The latent noise of a variational autoencoder is there in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(12, 8), nn.Linear(4, 8)
        self.norm1, self.norm2, self.out = nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.norm1(self.encode(x)).chunk(2, 1)
        if self.training:
            mean = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.out(self.norm2(self.decode(mean)).relu())


class DETR(nn.Module):
    """Detection: a convolutional backbone, a transformer with queries, BN in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.queries = double_conv(3, 8), nn.Parameter(normal(3, 8))
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, 0.2, batch_first=True)
        self.head, self.norm, self.boxes = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone(x).flatten(2).transpose(1, 2)
        decoded = self.transformer(tokens, self.queries.expand(len(x), -1, -1))
        hidden = self.norm(self.head(decoded).transpose(1, 2)).transpose(1, 2)
        return self.boxes(hidden.relu()).sigmoid()


class TableMLP(nn.Module):
    """Tables: embeddings of categories with dropout of their own, numbers beside them (fastai)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.embedding_drop, self.numbers_norm = (
            nn.Embedding(5, 4),
            nn.Dropout(0.2),
            nn.BatchNorm1d(3),
        )
        self.body = nn.Sequential(
            nn.Linear(7, 10),
            nn.ReLU(),
            nn.BatchNorm1d(10),
            nn.Dropout(0.3),
            nn.Linear(10, 8),
            nn.ReLU(),
            nn.BatchNorm1d(8),
            nn.Linear(8, 2),
        )

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        embedded = self.embedding_drop(self.embedding(categories))
        return self.body(torch.cat([embedded, self.numbers_norm(numbers)], 1))


def voxels() -> nn.Sequential:
    """Volumes: a sparse occupancy grid through 3-d convolutions."""
    return nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2), nn.Dropout3d(0.2),
        nn.Conv3d(6, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Dropout(0.4), nn.Linear(6, 3),
    )  # fmt: skip


class TDNN(nn.Module):
    """Speakers: dilated layers over frames, mean and deviation over time, BN over segments (x-vectors)."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Sequential(
            nn.Conv1d(6, 8, 3), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(0.2),
            nn.Conv1d(8, 8, 3, dilation=2), nn.ReLU(), nn.BatchNorm1d(8),
        )  # fmt: skip
        self.segment, self.norm, self.head = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frames(x)
        pooled = torch.cat([x.mean(2), (x.var(2) + 1e-3).sqrt()], 1)
        return self.head(self.norm(self.segment(pooled)).relu())


class DeepSets(nn.Module):
    """Sets: elements are folded into the batch, summed per set, and BN runs on both sides of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.element = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.set = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, sets: Tensor) -> Tensor:
        return self.set(self.element(sets.flatten(0, 1)).unflatten(0, sets.shape[:2]).sum(1))


class Policy(nn.Module):
    """Reinforcement learning: a shared trunk, an actor behind dropout, a critic beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Tanh())
        self.actor = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
        )
        self.critic = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(state)
        return self.actor(hidden).softmax(1), self.critic(hidden).squeeze(1)


class GhostResNet(nn.Module):
    """Images: a residual block whose BN layers see virtual batches, with stochastic depth."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.size, self.stem = size, nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm1, self.norm2, self.last, self.head = (
            nn.BatchNorm2d(8),
            nn.BatchNorm2d(8),
            nn.BatchNorm2d(8),
            nn.Linear(8, 4),
        )

    def ghost(self, norm: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([norm(part) for part in x.split(self.size)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = self.ghost(self.norm2, self.conv2(self.ghost(self.norm1, self.conv1(x)).relu()))
        if self.training:
            inner = inner * torch.empty(len(x), 1, 1, 1).bernoulli_(0.7) / 0.7
        return self.head(self.ghost(self.last, x + inner).relu().mean((2, 3)))


class WeightTied(nn.Module):
    """A recursion: one block runs three times, each time behind its own dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.step, self.norm, self.drop = (
            nn.Linear(5, 8),
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.2),
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + torch.tanh(self.norm(self.step(self.drop(x))))
        return self.head(x)


class Experts(nn.Module):
    """A soft mixture of experts, one of which has dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.noisy = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.BatchNorm1d(8))
        self.plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gate(x).softmax(1)
        mixed = weight[:, :1] * self.noisy(x) + weight[:, 1:] * self.plain(x)
        return self.head(self.norm(mixed).relu())


class TwoTowers(nn.Module):
    """Retrieval: an image and a text tower, dropout in the text alone."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.image_norm = double_conv(3, 8), nn.BatchNorm1d(8)
        self.tokens, self.text_drop, self.text_norm = nn.Embedding(10, 8), nn.Dropout(0.3), nn.BatchNorm1d(8)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        image = self.image_norm(self.image(pixels).mean((2, 3)))
        text = self.text_norm(self.text_drop(self.tokens(tokens)).mean(1))
        return F.normalize(image, dim=1) @ F.normalize(text, dim=1).T


class SqueezeExcite(nn.Module):
    """Attention over channels, with dropout in the gate only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = (
            double_conv(3, 8),
            nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Dropout(0.4), nn.Linear(4, 8)),
        )
        self.conv, self.head = double_conv(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(self.conv(x).mean((2, 3)))


def self_normalising() -> nn.Sequential:
    """SELU with alpha dropout, and BN behind it all the same."""
    return nn.Sequential(
        nn.Linear(6, 10),
        nn.SELU(),
        nn.AlphaDropout(0.1),
        nn.Linear(10, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 2),
    )


FIELDS: dict[str, tuple[Callable[[], nn.Module], Batch]] = {
    "conformer": (Conformer, normal(24, 10, 8)),
    "CRNN": (CRNN, normal(24, 1, 8, 12)),
    "U-Net": (UNet, normal(24, 2, 8, 8)),
    "PointNet": (PointNet, normal(64, 3, 16)),
    "TabNet": (TabNet, normal(128, 6)),
    "R(2+1)D": (R2Plus1D, normal(24, 2, 4, 6, 6)),
    "GCN": (GCN, graph_batch()),
    "GAT": (GAT, normal(32, 6, 5)),
    "discriminator": (discriminator, normal(48, 3, 8, 8)),
    "generator": (generator, normal(48, 6)),
    "siamese": (Siamese, {"left": normal(64, 6), "right": 1.5 * normal(64, 6, seed=1) + 0.5}),
    "LSTM": (LSTMNet, normal(64, 6, 4)),
    "TSM": (TSM, normal(24, 4, 2, 6, 6)),
    "WaveNet": (WaveNet, normal(24, 1, 24)),
    "autoencoder": (autoencoder, normal(96, 12)),
    "VAE": (VAE, normal(96, 12)),
    "DETR": (DETR, normal(48, 3, 4, 4)),
    "table": (TableMLP, {"categories": torch.arange(96) % 5, "numbers": normal(96, 3)}),
    "voxels": (voxels, (normal(24, 1, 6, 6, 6) > 0.8).float()),
    "TDNN": (TDNN, normal(48, 6, 16)),
    "DeepSets": (DeepSets, normal(64, 5, 4)),
    "policy": (Policy, normal(96, 6)),
    "ghost ResNet": (GhostResNet, normal(48, 3, 6, 6)),
    "weight-tied": (WeightTied, normal(96, 5)),
    "experts": (Experts, normal(96, 6)),
    "two towers": (TwoTowers, {"pixels": normal(64, 3, 4, 4), "tokens": torch.arange(192).view(64, 3) % 10}),
    "squeeze and excite": (SqueezeExcite, normal(32, 3, 6, 6)),
    "SELU": (self_normalising, normal(96, 6)),
}  # fmt: skip
