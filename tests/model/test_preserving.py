"""Whatever a forward does to a model or to torch's settings, nothing remains: every kind of change, mixtures.

``photograph`` compares, and shares no code with what puts things back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import photograph
import pytest
import torch
from faulty_operations import Faulty, Injected
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mutations import MUTATIONS, OUTCOMES, SETTINGS, Attic, fail, unchanged
from torch import Tensor, nn

from ckpt_tools.errors import ModelError
from ckpt_tools.model import torch_settings
from ckpt_tools.model.preserving import preserve_models, preserved_evaluation_mode
from ckpt_tools.model.tensor_state import _copy_of

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


torch.use_deterministic_algorithms(False)  # the first call makes torch import a part of itself


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_kind_of_change_is_undone(name: str) -> None:
    attic = Attic()
    before = photograph.of_model(attic)
    for error in OUTCOMES:
        with unchanged(attic), suppress(Injected, KeyboardInterrupt), preserve_models(attic), torch.no_grad():
            MUTATIONS[name](attic)
            assert photograph.differences(before, photograph.of_model(attic))  # or the oracle is blind
            fail(error)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(sorted(MUTATIONS)), min_size=2, max_size=8), st.sampled_from(OUTCOMES))
def test_any_sequence_of_changes_is_undone(program: list[str], error: type[BaseException] | None) -> None:
    attic = Attic()
    with unchanged(attic), suppress(Injected, KeyboardInterrupt), preserve_models(attic), torch.no_grad():
        for name in program:
            with suppress(
                AttributeError, RuntimeError, TypeError, KeyError, ValueError
            ):  # on what is gone by now
                MUTATIONS[name](attic)
        fail(error)


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt])
def test_an_error_while_things_are_put_back_keeps_nothing_from_it(error: type[BaseException]) -> None:
    attic = Attic()
    program = ["data_replaced", "overlapping", "gradients_zeroed", "resized", "converted", "requires_grad"]

    def run(mode: Faulty) -> None:
        with suppress(error), preserve_models(attic):
            for name in program:
                MUTATIONS[name](attic)
            mode.__enter__()
        mode.__exit__(None, None, None)

    run(Faulty())  # the first dispatch mode makes torch import a part of itself
    counted = Faulty()
    with unchanged(attic), torch.no_grad():
        run(counted)
        assert counted.seen > 20
        for at in range(1, counted.seen + 1):
            run(Faulty(at, error))


def test_what_cannot_be_put_back_is_said_and_the_rest_is_put_back() -> None:
    attic = Attic()
    base = torch.zeros(2, 3)
    attic.register_buffer("row", base[1])
    weight = attic.weight.detach().clone()

    def join_graph() -> None:  # of a view, which torch cannot take out of a graph again
        with preserve_models(attic), torch.enable_grad():
            attic.weight.data.zero_()
            attic.row.add_(attic.zeros)

    with pytest.raises(ModelError, match=r"Attic: expected to leave the model .* cannot be undone"):
        join_graph()
    assert torch.equal(attic.weight, weight)


def test_a_storage_that_has_grown_comes_back_but_for_its_address() -> None:
    attic = Attic()
    before = photograph.of_model(attic)
    with preserve_models(attic):
        attic.counter.resize_(1000).fill_(1)
    (place,) = photograph.differences(before, photograph.of_model(attic))
    assert place == "_buffers[counter]"
    assert torch.equal(attic.counter, torch.zeros(3))
    assert attic.counter.untyped_storage().nbytes() == 12


def test_nothing_is_written_where_nothing_has_changed() -> None:
    """A graph that saved a tensor can still be used, and memory that processes share is not dirtied."""
    attic = Attic()
    versions = [tensor._version for tensor in attic.parameters()]
    loss = (attic.weight * attic.weight).sum()
    for change in (lambda: None, lambda: attic.weight.data.add_(1)):
        with preserve_models(attic), torch.no_grad():
            change()
    loss.backward()
    assert [tensor._version for tensor in attic.parameters()] == versions


@pytest.mark.parametrize("ambient", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")])
def test_within_modes_of_the_caller(ambient: Callable[[], Any]) -> None:
    attic = Attic()
    with ambient(), unchanged(attic), preserve_models(attic):
        for name in (
            "data_in_place",
            "data_replaced",
            "overlapping",
            "resized",
            "gradients_zeroed",
            "inferred",
        ):
            MUTATIONS[name](attic)


@pytest.mark.filterwarnings("ignore:.*quantize.*", "ignore:.*jit.*")
def test_quantised_and_scripted_models() -> None:
    quantised = nn.Module()
    quantised.register_buffer("q", torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
    with unchanged(quantised), preserve_models(quantised):
        quantised.q.copy_(torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8))
        quantised.q.data = torch.quantize_per_tensor(torch.ones(5), 0.5, 0, torch.qint8)
    scripted = torch.jit.script(nn.BatchNorm1d(3))
    before = {key: value.clone() for key, value in scripted.state_dict().items()}
    with preserved_evaluation_mode(scripted), torch.no_grad():
        assert not scripted.training
        scripted.weight.data.add_(1)
        scripted.running_var.add_(1)
    assert scripted.training
    assert all(torch.equal(before[key], value) for key, value in scripted.state_dict().items())


def test_modules_that_functions_run_come_back() -> None:
    norms = [nn.BatchNorm1d(3) for _ in range(3)]
    x = torch.randn(4, 3)
    model = nn.Linear(3, 3)
    closing, default = norms[0], norms[1]
    model.register_forward_hook(lambda module, args, output: closing(output))
    model.register_forward_hook(lambda module, args, output, norm=default: norm(output))
    model.forward_again = norms[2].forward
    before = [photograph.of_model(norm) for norm in norms]
    with unchanged(model), preserve_models(model):
        model(x)
        model.forward_again(x)
    assert [photograph.of_model(norm) for norm in norms] == before


def test_a_log_keeps_what_a_forward_has_told() -> None:
    attic = Attic()
    with preserve_models(attic):
        attic.log.append(2)
        attic.log = []
    assert attic.log == [1, 2]


def test_flat_weights_of_an_rnn_come_back_with_its_weights() -> None:
    rnn = nn.LSTM(3, 4)
    with unchanged(rnn), preserve_models(rnn):
        rnn.weight_ih_l0 = nn.Parameter(torch.zeros(16, 3))
        assert rnn._flat_weights[0] is rnn.weight_ih_l0


class _Crowded:
    """A tensor on a device without room for a copy."""

    device = torch.device("cuda")

    def clone(self) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def cpu(self) -> Tensor:
        return torch.ones(1)


def test_copies_go_to_main_memory_where_the_device_is_full() -> None:
    assert _copy_of(_Crowded()).device.type == "cpu"  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*(TF32|tf32|Anomaly).*")
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_comes_back(name: str) -> None:
    for error in OUTCOMES:
        before = photograph.of_process()
        with unchanged(), suppress(Injected, KeyboardInterrupt), preserve_models():
            SETTINGS[name]()
            assert photograph.differences(before, photograph.of_process())
            fail(error)


@pytest.mark.filterwarnings("ignore:.*(TF32|tf32|Anomaly).*")
@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([name for name in SETTINGS if name != "gradients"]), max_size=3),
    st.lists(st.sampled_from(sorted(SETTINGS)), max_size=8),
)
def test_any_mixture_of_settings_comes_back(own: list[str], changes: list[str]) -> None:
    """Also where the caller's own settings are none of the defaults."""
    defaults = [
        torch_settings._read(torch_settings._OF_THE_PROCESS),
        torch_settings._read(torch_settings._OF_THE_THREAD),
    ]
    try:
        for name in own:
            SETTINGS[name]()
        assume(
            RuntimeError not in dict(photograph.of_process()["switches"]).values()
        )  # names of TF32 contradict
        with unchanged(), preserve_models():
            for name in changes:
                SETTINGS[name]()
    finally:
        for values in defaults:
            torch_settings._restore(values)


def test_threads_that_take_turns_leave_the_settings_of_the_process() -> None:
    first, second = threading.Event(), threading.Event()

    def inner() -> None:
        with preserve_models():
            first.set()
            second.wait()

    with unchanged():
        thread = threading.Thread(target=inner)
        with preserve_models():
            torch.set_default_dtype(torch.float64)
            thread.start()
            first.wait()
        second.set()
        thread.join()
