"""Recurrent networks: noise is followed through them, and long sequences cost no more than short ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dropout_oracle import changed_by_dropout
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import ckpt_tools
from ckpt_tools.walker.graph import Recorder


class Tagger(nn.Module):
    """BN in front of a recurrent network, BN behind it, and BN on its last state."""

    def __init__(self, rnn: nn.RNNBase, *, packed: bool = False) -> None:
        super().__init__()
        self.rnn, self.packed = rnn, packed
        width = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        self.bn0, self.bn1 = nn.BatchNorm1d(rnn.input_size), nn.BatchNorm1d(width)
        self.bn2 = nn.BatchNorm1d(rnn.proj_size or rnn.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(x.transpose(1, 2)).transpose(1, 2)
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        if self.packed:
            lengths = torch.arange(x.shape[1], x.shape[1] - x.shape[0], -1)
            packed, state = self.rnn(pack_padded_sequence(x, lengths, batch_first=True))
            x, _ = pad_packed_sequence(packed, batch_first=True)
        else:
            x, state = self.rnn(x)
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        last = state[0] if isinstance(state, tuple) else state
        return self.bn1(x.transpose(1, 2)).mean(2), self.bn2(last[-1])


class Loop(nn.Module):
    """A cell that a loop calls; dropout on its state, on its input, or behind it."""

    def __init__(self, kind: type[nn.RNNCellBase], place: str) -> None:
        super().__init__()
        self.cell, self.place = kind(4, 5), place
        self.drop = nn.Dropout(0.4)
        self.bn0, self.bn1 = nn.BatchNorm1d(5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(self.drop(step) if self.place == "input" else step, state)
            if self.place == "state":
                state = tuple(map(self.drop, state)) if isinstance(state, tuple) else self.drop(state)
        hidden = state[0] if isinstance(state, tuple) else state
        return self.bn1(self.drop(self.bn0(hidden)))


CASES: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: Tagger(nn.GRU(4, 5, 2, dropout=0.4, batch_first=True)),
    "rnn, time first": lambda: Tagger(nn.RNN(4, 5, 3, dropout=0.4, nonlinearity="relu")),
    "two directions": lambda: Tagger(nn.LSTM(4, 5, 2, dropout=0.4, bidirectional=True)),
    "projections": lambda: Tagger(nn.LSTM(4, 6, 2, dropout=0.4, proj_size=3, batch_first=True)),
    "packed lstm": lambda: Tagger(nn.LSTM(4, 5, 2, dropout=0.4, batch_first=True), packed=True),
    "packed gru": lambda: Tagger(
        nn.GRU(4, 5, 2, dropout=0.4, bidirectional=True, batch_first=True), packed=True
    ),
    "one layer has no dropout": lambda: nn.Sequential(
        Tagger(nn.GRU(4, 5, batch_first=True)),
    ),
    **{
        f"{kind.__name__}, {place}": (lambda kind=kind, place=place: Loop(kind, place))
        for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
        for place in ("input", "state", "behind")
    },
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", CASES)
def test_noise_is_followed_through_recurrent_networks(name: str) -> None:
    torch.manual_seed(0)
    model, x = CASES[name]().eval(), torch.randn(3, 9, 4)
    walk = ckpt_tools.walk(model, x)
    assert {layer.name for layer in walk.batch_norms if layer.downstream_of} == changed_by_dropout(model, x)
    assert all(layer.reached for layer in walk.batch_norms)


def count_operations(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    counts: list[int] = []
    add_operation = Recorder.add_operation

    def count_and_add(self: Recorder, *args: object) -> None:
        counts.append(1)
        add_operation(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "add_operation", count_and_add)
        ckpt_tools.walk(model, x)
    return len(counts)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", [name for name in CASES if "Cell" not in name])
def test_the_cost_does_not_grow_with_the_sequence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASES[name]().eval()
    short, long = (count_operations(model, torch.randn(2, steps, 4), monkeypatch) for steps in (6, 60))
    assert long == short


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_further_step_of_a_cell_is_one_operation(
    kind: type[nn.RNNCellBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Loop(kind, "behind").eval()
    short, long = (count_operations(model, torch.randn(2, steps, 4), monkeypatch) for steps in (6, 16))
    assert long - short == 3 * 10  # three forwards


def test_decisions_by_the_output_of_a_recurrent_network_see_its_values() -> None:
    seen: list[float] = []

    class Decides(Tagger):
        def forward(self, x: Tensor) -> Tensor:
            out, state = self.rnn(x)
            seen.append(float(out.sum()) + float(state.sum()))
            return self.bn1(out.transpose(1, 2))

    torch.manual_seed(0)
    model, x = Decides(nn.GRU(4, 5, batch_first=True)).eval(), torch.randn(2, 30, 4)
    ckpt_tools.walk(model, x)
    walked = [*seen]
    with torch.no_grad():
        model(x)
    assert len(walked) >= 3
    assert walked == pytest.approx([seen[-1]] * len(walked), rel=1e-5)


def test_the_weights_of_a_recurrent_network_are_listed() -> None:
    walk = ckpt_tools.walk(Tagger(nn.GRU(4, 5, batch_first=True)), torch.randn(2, 40, 4))
    assert [layer.parameter for layer in walk.weights] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]


def test_rate_zero_is_a_site_that_could_be_active() -> None:
    walk = ckpt_tools.walk(Tagger(nn.LSTM(4, 5, 2, batch_first=True)), torch.randn(2, 20, 4))
    behind = {layer.name for layer in walk.batch_norms if layer.potentially_downstream_of}
    assert behind == {"bn1", "bn2"}
