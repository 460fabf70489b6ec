"""A construction ends where it costs more than a file justifies, and nobody is asked anything meanwhile."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from ckpt_adapters.construct import construct, construct_skeleton
from ckpt_tools.cli import main
from ckpt_tools.construction import ConstructionBudget, count_construction, limited_construction
from ckpt_tools.errors import ArchitectureError

SMALL = ConstructionBudget(modules=50, values=1000)


class Deep(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(depth))


class DeepAgain(nn.Module):
    """Catches what a construction raises and goes on, as constructors with a fallback do."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        for number in range(depth):
            try:
                self.add_module(str(number), nn.Identity())
            except Exception:  # noqa: BLE001 - as written by others
                continue


class Parameters(nn.Module):
    def __init__(self, count: int = 3, size: int = 1) -> None:
        super().__init__()
        for number in range(count):
            self.register_parameter(f"p{number}", nn.Parameter(torch.zeros(size)))


class Buffers(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        for number in range(count):
            self.register_buffer(f"b{number}", torch.zeros(1))


class Large(nn.Module):
    def __init__(self, side: int = 10) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(side, side))


class Endless(nn.Module):
    def __init__(self, steps: int = 1) -> None:
        super().__init__()
        while steps:
            steps += 1


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.answer = input()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("make", "kwargs", "what"),
    [
        (Deep, {"depth": 10**9}, "modules"),
        (DeepAgain, {"depth": 10**9}, "modules"),
        (Parameters, {"count": 10**9}, "parameters and buffers"),
        (Buffers, {"count": 10**9}, "parameters and buffers"),
        (Endless, {}, "s to build"),
    ],
)
def test_a_construction_without_end_ends(
    make: type[nn.Module], kwargs: dict[str, int], what: str, device: str
) -> None:
    budget = ConstructionBudget(SMALL.modules, SMALL.values, seconds=0.2 if make is Endless else 30)
    message = rf"^bad\.pt: .*{what}.*--model-kwargs"
    with (
        pytest.raises(ArchitectureError, match=message),
        limited_construction(budget, "bad.pt"),
        torch.device(device),
    ):
        construct("net", make, kwargs)


def test_memory_is_not_taken_before_it_is_counted() -> None:
    for make, kwargs in ((Large, {"side": 10**7}), (Parameters, {"count": 20, "size": 900})):
        with pytest.raises(ArchitectureError, match="values"), limited_construction(SMALL, "bad.pt"):
            construct("net", make, kwargs)
    with limited_construction(SMALL, "good.pt"), torch.device("meta"):  # takes none
        construct("net", Large, {"side": 10**7})


def test_what_stays_within_is_built_again_and_again() -> None:
    with limited_construction(SMALL, "good.pt"):
        for _ in range(20):  # each construction counts for itself
            assert len(list(construct_skeleton(Deep, {"depth": 40}).modules())) == 42


def test_a_construction_counts_its_own_thread_alone() -> None:
    def build_much() -> None:
        Deep(500)

    other = threading.Thread(target=build_much)
    with limited_construction(SMALL, "good.pt"), count_construction():
        other.start()
        other.join()
        Deep(10)


def test_hooks_and_standard_input_are_as_before_afterwards() -> None:
    hooks = (
        nn.modules.module._global_module_registration_hooks,
        nn.modules.module._global_parameter_registration_hooks,
        nn.modules.module._global_buffer_registration_hooks,
    )
    before, stdin = [len(each) for each in hooks], sys.stdin
    with pytest.raises(ArchitectureError), limited_construction(SMALL, "bad.pt"):
        construct("net", Deep, {"depth": 100})
    assert [len(each) for each in hooks] == before
    assert sys.stdin is stdin
    construct("net", Deep, {"depth": 100})


def test_nobody_is_asked_while_a_library_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 5))
    with pytest.raises(ArchitectureError, match="EOFError"), limited_construction(None, "any.pt"):
        construct("net", Asking, {})
    assert construct("net", Asking, {}).answer == "yes"  # code that the user named may ask


@pytest.mark.parametrize(
    "words",
    [
        {"arch": "vit_tiny_patch16_224", "model_kwargs": {"depth": 10**7}},
        {"arch": "resnet18", "model_kwargs": {"layers": [10**6] * 4}},
        {"arch": "vit_tiny_patch16_224", "model_kwargs": {"embed_dim": 2**40, "num_heads": 1}},
        {"arch": "efficientnet_b0", "model_kwargs": {"channel_multiplier": 1e9, "num_features": 10**10}},
        {"arch": "densenet121", "model_kwargs": {"block_config": [10**5] * 4}},
        {"args": {"model": "resnet18", "drop": 0.1, "split_bn": True, "aug_splits": 10**8}},
        {"arch": "swin_t", "model_kwargs": {"dropout": 10**9}},
        {"arch": "test_resnet", "model_kwargs": {"stem_width": [[[[[[[[[[[[3]]]]]]]]]]]]}},
    ],
    ids=str,
)
def test_small_files_that_describe_large_models_are_refused(
    tmp_path: Path, words: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(
        {"state_dict": {"w": torch.ones(2), "b.running_var": torch.ones(2)}, **words}, tmp_path / "bad.pt"
    )
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(tmp_path / "bad.pt")])
    assert end.value.code == 1
    assert "bad.pt: " in capsys.readouterr().err
