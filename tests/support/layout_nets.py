"""Small networks whose tensors are sparse or nested."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NODES = 24


def to_layout(dense: Tensor, layout: str) -> Tensor:
    sparse = {"coo": dense.to_sparse, "csr": dense.to_sparse_csr, "csc": dense.to_sparse_csc}
    return sparse[layout]()


def adjacency() -> Tensor:
    """Normalised by degree, as Kipf and Welling (2017) have it."""
    links = torch.rand(NODES, NODES, generator=torch.Generator().manual_seed(1)) > 0.8
    dense = (links | links.T).float().fill_diagonal_(1)
    scale = dense.sum(1).rsqrt()
    return scale[:, None] * dense * scale


class GCN(nn.Module):
    """Kipf and Welling's network with BN: ``where`` the adjacency is held decides its forward."""

    def __init__(self, where: str, layout: str) -> None:
        super().__init__()
        self.where, self.layout = where, layout
        self.dense = adjacency()
        if where == "buffer":
            self.register_buffer("links", to_layout(self.dense, layout))
        self.linear1, self.linear2 = nn.Linear(5, 7), nn.Linear(7, 6)
        self.bn0, self.bn1, self.bn2 = nn.BatchNorm1d(5), nn.BatchNorm1d(7), nn.BatchNorm1d(6)

    def forward(self, x: Tensor, links: Tensor | None = None) -> Tensor:
        if self.where == "buffer":
            links = self.links
        elif self.where == "inside":
            links = to_layout(self.dense, self.layout)
        x = links @ self.linear1(F.dropout(self.bn0(x), 0.3, self.training))
        return self.bn2(links @ self.linear2(self.bn1(x).relu()))

    def batches(self) -> list[object]:
        xs = [torch.randn(NODES, 5) * 2 for _ in range(4)]
        if self.where == "input":
            return [{"x": x, "links": to_layout(self.dense, self.layout)} for x in xs]
        return list(xs)


class SparseFeatures(nn.Module):
    """Bags of words as sparse rows, with their own dropout: it draws a mask of the entries."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 5))
        self.bn0, self.bn1, self.bn2 = nn.BatchNorm1d(3), nn.BatchNorm1d(5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.coalesce()
        values = F.dropout(x.values(), 0.4, self.training)
        dropped = torch.sparse_coo_tensor(x.indices(), values, x.shape, is_coalesced=True)
        untouched = torch.sparse.mm(x, self.weight)
        return self.bn2(torch.sparse.mm(dropped, self.weight)) + self.bn1(untouched)

    def batches(self) -> list[Tensor]:
        return [(torch.rand(16, 12) * (torch.rand(16, 12) > 0.6)).to_sparse() for _ in range(4)]


class Ragged(nn.Module):
    """Sequences of different lengths as one nested tensor; BN sees every step once."""

    def __init__(self, layout: torch.layout, *, made_inside: bool) -> None:
        super().__init__()
        self.layout, self.made_inside = layout, made_inside
        self.linear, self.drop, self.head = nn.Linear(4, 6), nn.Dropout(0.4), nn.Linear(6, 6)
        self.bn0, self.bn1, self.bn2 = nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        if self.made_inside:
            x = torch.nested.nested_tensor(list(x), layout=self.layout)
        before = self.linear(x)
        steps = torch.cat(before.unbind())
        after = self.head(self.drop(before)).to_padded_tensor(0.0)
        return self.bn2(after.transpose(1, 2)).sum() + self.bn0(steps).sum()

    def batches(self) -> list[Tensor]:
        if self.made_inside:
            return [torch.randn(6, 5, 4) for _ in range(4)]
        rows = [[torch.randn(length, 4) for length in (3, 5, 2, 7)] for _ in range(4)]
        return [torch.nested.nested_tensor(row, layout=self.layout) for row in rows]


# How each is made, and its layers behind dropout in order of execution.
NETS = {
    **{
        f"GCN {where} {layout}": (lambda where=where, layout=layout: GCN(where, layout), ["bn1", "bn2"])
        for where in ("buffer", "input", "inside")
        for layout in ("coo", "csr", "csc")
    },
    "sparse features": (SparseFeatures, ["bn2"]),
    **{
        f"nested {layout} {made_inside}": (
            lambda layout=layout, made_inside=made_inside: Ragged(layout, made_inside=made_inside),
            ["bn2"],
        )
        for layout in (torch.strided, torch.jagged)
        for made_inside in (False, True)
    },
}
