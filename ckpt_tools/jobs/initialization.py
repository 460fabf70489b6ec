"""Initialisation from file to file: new weights for a fresh checkpoint, or for an architecture
alone.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ckpt_tools.contract import BackwardFactor, BackwardTerm, InitRule, LoadedModel, Scheme
from ckpt_tools.data.data_source import open_source
from ckpt_tools.data.preprocessing import Preprocessing, example_input, resolve_input_spec
from ckpt_tools.errors import ArchitectureError, CheckFailed, UsageError
from ckpt_tools.identify.loading import identify_model, load_architecture
from ckpt_tools.initialize.init_results import InitRewrite, LayerSignal
from ckpt_tools.initialize.rewrite import rewrite_init
from ckpt_tools.jobs.outputs import default_output_path, refuse_overwriting_data
from ckpt_tools.jobs.request import ModelChoice
from ckpt_tools.jobs.verification import VerificationBatches, make_verification_batches
from ckpt_tools.location import Location, LocationLike
from ckpt_tools.machine.device import resolve_device
from ckpt_tools.model.calling import unwrap_model
from ckpt_tools.observation.training_history import INITIAL_ERROR
from ckpt_tools.storage.output.checkpoint_writer import (
    OutputDigests,
    check_output,
    replace_tensors,
    write_safetensors,
)
from ckpt_tools.storage.provenance import output_metadata
from ckpt_tools.storage.reading import read_checkpoint

_FRESH_VALUES = {"num_batches_tracked": 0, "running_mean": 0, "running_var": 1}

SignalsCallback = Callable[[tuple[LayerSignal, ...], tuple[LayerSignal, ...]], None]


@dataclass(frozen=True)
class InitRequest:
    """Everything the user asks of an initialisation.

    Without ``checkpoint``, an architecture and ``output`` are needed. ``samples`` and ``device``
    concern the verification: new weights are made on the CPU, so that they are the same everywhere.
    """

    checkpoint: Location | None = None
    output: Location | None = None
    model: ModelChoice = field(default_factory=ModelChoice)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    scheme: Scheme = "hypersphere"
    rule: InitRule = "paper"
    backward_term: BackwardTerm = "auto"
    backward_factor: BackwardFactor = "paper"
    seed: int = 0
    verify: bool = False
    data: str | None = None
    samples: int = 64
    device: str = "auto"
    report: Location | None = None
    overwrite: bool = False
    force: bool = False

    @property
    def needs_verification(self) -> bool:
        """Whether signals are measured: data and a picture make no sense without."""
        return self.verify or self.data is not None or self.report is not None


@dataclass(frozen=True)
class InitOutcome:
    """The result of an initialisation: the new weights, the file and its source.

    ``before`` and ``after`` are the signals of the layers, if the user asked for them.
    """

    request: InitRequest
    loaded: LoadedModel
    result: InitRewrite
    output: Location
    output_sha256: str
    source_sha256: str | None = None
    trial: VerificationBatches | None = None
    before: tuple[LayerSignal, ...] = ()
    after: tuple[LayerSignal, ...] = ()


def initialize_checkpoint(request: InitRequest, draw: SignalsCallback | None = None) -> InitOutcome:
    """Give a model new weights by the rule and write it as a safetensors file.

    From a checkpoint file, every tensor but the new ones comes out bit for bit. From an
    architecture alone, all other tensors have the library's own initialisation under
    ``request.seed``. ``draw`` is called with the signals before and after, just before the output
    is written. Raises any CkptToolsError; then nothing is written.
    """
    output = _choose_output(request)
    loaded, example, trial = _prepare_model(request)
    before = trial.measure_layer_signals(loaded.model, request.seed) if trial else ()
    result = rewrite_init(
        loaded.model,
        example,
        scheme=request.scheme,
        rule=request.rule,
        backward_term=request.backward_term,
        backward_factor=request.backward_factor,
        seed=request.seed,
    )
    after = trial.measure_layer_signals(loaded.model, request.seed) if trial else ()
    # Before the output is written: if the picture fails, there is no output either.
    if draw is not None and trial is not None:
        draw(before, after)
    digests = write_initialized(output, loaded, result, overwrite=request.overwrite)
    source_sha256 = digests.source or None
    return InitOutcome(request, loaded, result, output, digests.output, source_sha256, trial, before, after)


def refuse_trained_checkpoint(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckFailed for a state dict whose BatchNorm layers have seen data.

    Their counters tell, and so do running statistics other than mean 0 and variance 1: converted
    files have no counters, or counters of 0. New weights would throw the training away.
    """
    named = [(name, key) for name in _FRESH_VALUES for key in tensors if key.endswith(name)]
    for name, key in named:
        initial, tensor = _FRESH_VALUES[name], tensors[key]
        if not tensor.numel():
            continue
        values = tensor.double().reshape(-1)
        farthest = (values - initial).abs().argmax()
        # A comparison with NaN is false, and NaN is not fresh, either.
        if not abs(float(values[farthest]) - initial) <= INITIAL_ERROR:
            raise CheckFailed(
                f"{key}: expected {initial} in a fresh checkpoint, found {float(values[farthest]):g}: "
                "this model was trained, and new weights would throw that away. Give a fresh "
                "checkpoint, or --arch alone; --force rewrites it all the same."
            )


def _choose_output(request: InitRequest) -> Location:
    """Where the output goes, after a check that it may be written.

    Raises UsageError, OutputError.
    """
    if request.checkpoint is None and request.model.architecture is None:
        raise UsageError("Give a fresh checkpoint, or an architecture with --arch.")
    if request.checkpoint is not None:
        output = request.output or default_output_path(request.checkpoint, "init")
        check_output(output, request.checkpoint, overwrite=request.overwrite)
    elif request.output is not None:
        output = request.output
        check_output(output, None, overwrite=request.overwrite)
    else:
        raise UsageError(
            f"--arch {request.model.architecture} alone names no output. Give one with -o, e.g. -o "
            "init.safetensors."
        )
    if request.data is not None:
        refuse_overwriting_data(output, request.data)
    if request.report is not None and request.report.path.absolute() == output.path.absolute():
        raise UsageError(
            f"--report {request.report}: expected a file of its own, found the output's name. Choose another."
        )
    return output


def _prepare_model(request: InitRequest) -> tuple[LoadedModel, object, VerificationBatches | None]:
    """The model as it is, an input to walk it with, and the batches of the verification, if any."""
    transform_options = request.preprocessing.transform_options
    if request.data is None and transform_options:
        option = next(iter(transform_options)).replace("_", "-")
        raise UsageError(
            f"--{option}: says how images become inputs, but there are none. Give --data, or leave it out."
        )
    source = None
    if request.data is not None:
        source = open_source(request.data, limit=request.samples, seed=request.seed)
    # Without a verification no device is needed, and so none is asked for.
    device = resolve_device(request.device) if request.needs_verification else "cpu"
    loaded = _load_fresh_model(request)
    spec = resolve_input_spec(loaded.input_spec, request.preprocessing, source)
    example = example_input(spec, source)
    if not request.needs_verification:
        return loaded, example, None
    trial = make_verification_batches(
        loaded, example, spec, source, samples=request.samples, seed=request.seed, device=device
    )
    return loaded, example, trial


def _load_fresh_model(request: InitRequest) -> LoadedModel:
    if request.checkpoint is None:
        with seed_constructors(request.seed):
            return load_architecture(str(request.model.architecture), request.model.model_kwargs)
    checkpoint = read_checkpoint(request.checkpoint, weights=request.model.weights, trust=request.model.trust)
    if not request.force:
        refuse_trained_checkpoint(checkpoint.tensors)
    loaded = identify_model(checkpoint, request.model.architecture, request.model.model_kwargs)
    if loaded.as_built:
        raise ArchitectureError(
            f"{request.checkpoint}: expected every weight of {loaded.recipe.architecture}, found "
            f"another head under {', '.join(loaded.as_built)}, which would keep its old weights. "
            "Name what builds your model: --arch package.module:factory."
        )
    return loaded


@contextlib.contextmanager
def seed_constructors(seed: int) -> Iterator[None]:
    """Start every generator that a constructor may draw from on the CPU at ``seed``.

    Afterwards each is as it was before.
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # numpy takes no larger ones
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def write_initialized(
    output: LocationLike, loaded: LoadedModel, result: InitRewrite, *, overwrite: bool = False
) -> OutputDigests:
    """Write a model whose weights were rewritten.

    With a checkpoint, the file holds its tensors in their dtypes, the new ones in the place of the
    old; without one, the state dict as it stands, and the source's digest is empty. Raises
    OutputError.
    """
    values = unwrap_model(loaded.model).state_dict()
    state = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    rewritten = _every_name(state, [layer.parameter for layer in result.rewritten])
    zeroed = _every_name(state, [layer.bias for layer in result.rewritten if layer.bias])
    provenance = _provenance(loaded, result) | {"rewritten": rewritten, "zeroed": zeroed}
    if loaded.checkpoint is None:
        metadata = output_metadata(None, provenance)
        return write_safetensors(output, state, metadata=metadata, overwrite=overwrite)
    new = {key: state[key] for key in (*rewritten, *zeroed)}
    return replace_tensors(output, loaded.checkpoint, new, provenance=provenance, overwrite=overwrite)


def _every_name(state: Mapping[str, Tensor], keys: Iterable[str]) -> list[str]:
    """These keys and those of tied tensors, which hold the same numbers under another name."""
    memory = {_memory(state[key]) for key in keys}
    return [key for key, tensor in state.items() if _memory(tensor) in memory]


def _memory(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _provenance(loaded: LoadedModel, result: InitRewrite) -> dict[str, object]:
    """What the output says about itself: enough to repeat it, and no wall-clock time."""
    return {
        "expect": "init",
        "architecture": loaded.recipe.architecture,
        "model_kwargs": dict(loaded.recipe.kwargs),
        "scheme": result.scheme,
        "rule": result.rule,
        "backward_term": result.backward_term,
        "backward_factor": result.backward_factor,
        "seed": result.seed,
        "torch": torch.__version__,
    }
