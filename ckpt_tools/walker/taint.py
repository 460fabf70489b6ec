"""What is followed through one forward: which dropout sites have touched which memory.

The taint of a storage is the set of sites whose random numbers its contents depend on. It is kept
by storage and not by tensor, so that views share it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ckpt_tools.model.layouts import values_of
from ckpt_tools.results import DropoutSite
from ckpt_tools.walker.dropout_sites import HostRandomness, masking_drop_rate, module_drop_rate
from ckpt_tools.walker.graph import Graph, Recorder, storage_key

Taint = frozenset[str]  # names of dropout sites


class Feed(enum.Enum):
    """What a forward is run on, the cheapest first.

    On meta tensors it computes shapes only, which takes neither memory nor a GPU.
    """

    META = "meta tensors"
    TWO_SAMPLES = "the first two samples"
    WHOLE_BATCH = "the whole batch"


@dataclass
class ForwardRecord:
    """What one forward on a ``feed`` of so many ``samples`` has shown.

    ``inputs`` has the BN layers in order of execution, each with the sites that reach its input.
    ``called`` has the names of all BN modules that ran, whatever they did. ``peak_bytes`` is the
    most memory that the results of operations took at one time (in evaluation mode only).
    """

    feed: Feed
    samples: int
    graph: Graph
    inputs: dict[str, Taint] = field(default_factory=dict)
    sites: dict[str, DropoutSite] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    peak_bytes: int = 0

    @property
    def device(self) -> str:
        """Where the forward ran: "meta" or "cpu", which stands for every device with values."""
        return "meta" if self.feed is Feed.META else "cpu"


@dataclass
class _RunningModule:
    """A module whose forward is running. ``decided_by``: sites whose numbers chose its path."""

    name: str
    module: nn.Module | None
    sites: int = 0
    decided_by: Taint = frozenset()


class TaintTracker:
    """The state that the dispatch modes and the module hooks share during one forward.

    Attributes:
        record: what the forward has shown so far.
        recorder: builds the graph of operations.
        running: the modules whose forwards are running, the innermost last.
        dropout_call: op and rate of the dropout function that is running, if one is.
        foreign_module_ran: whether a module that is none of the copy's has run.
    """

    def __init__(
        self, model: nn.Module, record: ForwardRecord, recorder: Recorder, *, training: bool
    ) -> None:
        self.record, self.recorder = record, recorder
        self.running = [_RunningModule("", model)]
        self.dropout_call: tuple[str, float] | None = None
        self.foreign_module_ran = False
        self._training = training
        self._names = {id(module): name for name, module in model.named_modules()}
        self._host_randomness = HostRandomness()
        self._taint: dict[StorageWeakRef, Taint] = {}
        self._sizes: dict[StorageWeakRef, int] = {}

    def taint_of(self, tensors: Sequence[Tensor]) -> Taint:
        """Return the sites that any of the tensors depends on."""
        return _EMPTY.union(*(self._taint.get(storage_key(tensor), _EMPTY) for tensor in tensors))

    def add_taint(self, tensors: Sequence[Tensor], taint: Taint) -> None:
        """Add sites to those that the tensors depend on already."""
        for tensor in tensors:
            if taint:
                key = storage_key(tensor)
                self._taint[key] = self._taint.get(key, _EMPTY) | taint

    def decision_taint(self) -> Taint:
        """Return the sites whose random numbers have chosen the path that is running."""
        return _EMPTY.union(*(running.decided_by for running in self.running))

    def track_memory(self, tensors: Sequence[Tensor]) -> None:
        """Account for the bytes that are alive after an operation that has made ``tensors``."""
        for tensor in tensors:
            self._sizes[storage_key(tensor)] = values_of(tensor).untyped_storage().nbytes()
        # A storage that nobody holds any more has been freed.
        self._sizes = {key: size for key, size in self._sizes.items() if not key.expired()}
        self.record.peak_bytes = max(self.record.peak_bytes, sum(self._sizes.values()))

    def add_site_of_operation(
        self, func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> str:
        """Record the site of a random operation, and return its name.

        Op and rate are those of the dropout function that runs it. Outside of such a function the
        site is called after its module if that seems to do nothing else, having neither children
        nor parameters (a DropPath); else after the operation.
        """
        if self.dropout_call is not None:
            return self._add_site(*self.dropout_call)
        module = self.running[-1].module
        is_noise_module = module is not None and not module._modules and not module._parameters
        kind = getattr(module, "original_name", type(module).__name__)  # of scripted modules
        op = kind if is_noise_module else func._schema.name.replace("::", ".")
        rate = module_drop_rate(module)
        return self._add_site(op, masking_drop_rate(func, args, kwargs) if rate is None else rate)

    def _add_site(self, op: str, rate: float | None) -> str:
        running = self.running[-1]
        running.sites += 1
        # The second site of a module is called NAME:2, and so on, by the order of execution.
        name = running.name or "(root)"
        if running.sites > 1:
            name = f"{name}:{running.sites}"
        self.record.sites.setdefault(name, DropoutSite(name, op, rate))
        return name

    def taint_by_host_randomness(self) -> None:
        """Taint whatever the running module does next if Python or numpy has drawn a number.

        No tensor operation shows where that number goes. Layers may be skipped by one, say.
        """
        if self._training and self._host_randomness.has_advanced():
            running = self.running[-1]
            running.decided_by |= {self._add_site("random", module_drop_rate(running.module))}

    def enter_module(self, module: nn.Module, args: object) -> None:
        """Note that the forward of a module begins; a hook of torch calls this."""
        self.taint_by_host_randomness()
        self.foreign_module_ran |= id(module) not in self._names
        # Sites in a module outside the copy count for the module that called it.
        name = self._names.get(id(module), self.running[-1].name)
        self.running.append(_RunningModule(name, module))
        if isinstance(module, _BatchNorm):
            self.record.called.add(name)

    def leave_module(self, module: nn.Module, args: object, output: object) -> None:
        """Note that the forward of a module has ended, with an error or not."""
        self.taint_by_host_randomness()
        running = self.running.pop()
        # The caller sees nothing of the decision but what the module returns.
        if running.decided_by:
            self.add_taint(find_tensors(output), running.decided_by)
            if any(not isinstance(leaf, Tensor | None) for leaf in pytree.tree_leaves(output)):
                # It may decide by a bool or a number, too; nobody can follow those.
                self.running[-1].decided_by |= running.decided_by


_EMPTY: Taint = frozenset()


def find_tensors(tree: object) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
