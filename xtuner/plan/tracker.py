"""Device and host memory of a piece of engine code, by kind, from the tensors it makes: real ones and fake ones alike.

Every storage is counted once, from the operator that makes it until it is freed. What an operator uses only inside
itself is invisible from outside and comes from `workspace.py`.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from xtuner.ops import Float8Weight
from xtuner.plan.internals import SHAPE_FINDERS, AsyncCollectiveTensor, ShardingPropagator
from xtuner.plan.workspace import workspace_bytes

KINDS = ("parameters", "gradients", "optimizer", "activations", "communication", "workspace", "host")
_TO_HOST = torch.ops.xtuner.to_host.default
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


@dataclass
class Usage:
    """Bytes in use by kind; `host` is apart from the device's total."""

    by_kind: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def device(self) -> int:
        return sum(self.by_kind.values()) - self.by_kind["host"]

    def copy(self) -> Usage:
        return Usage(dict(self.by_kind))


class MemoryTracker(TorchDispatchMode):
    """Use as a context manager around the code; `phase` and `making` say what it is doing.

    Args:
        block: sizes are rounded up to multiples of this many bytes, as the device's allocator does; 1 for exact sums.
    """

    def __init__(self, block: int = 512):
        super().__init__()
        self.block = block
        self.now, self.peak, self.peak_phase = Usage(), Usage(), ""
        self.host_peak = 0
        self.phase_peaks: dict[str, int] = defaultdict(int)
        self.timeline: list[tuple[str, int]] = []  # phase, device bytes
        self.windows: list[tuple[str, int]] = []  # phase, its peak, of parts that `mark` ends
        self._window_peak = 0
        self._sizes: dict[int, tuple[int, str]] = {}  # storage -> bytes, kind
        self._phase, self._kind, self._paused = "", "activations", 0

    @contextmanager
    def phase(self, name: str, kind: str = "activations") -> Iterator[None]:
        """Name a part of the step; what it makes is of `kind` unless an operator says otherwise."""
        before = self._phase, self._kind
        self.mark()
        self._phase, self._kind = name, kind
        try:
            self._note()
            yield
        finally:
            self.mark()
            self._phase, self._kind = before

    def enter(self, name: str) -> None:
        """The next part of the step begins, which makes activations."""
        self.mark()
        self._phase, self._kind = name, "activations"
        self._note()

    def mark(self) -> None:
        """One window of a phase ends and another begins; the peak of each is kept apart."""
        self.windows.append((self._phase, self._window_peak))
        self._window_peak = self.now.device

    @property
    def phase_name(self) -> str:
        return self._phase

    def observe(self, func: torch._ops.OpOverload, args: Any, result: Any) -> None:
        """Called after every operator; for those who want to know more than memory."""

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """What is made inside is of `kind`."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def label(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Count `tensors`, and call them `kind` from now on."""
        for tensor in tensors:
            for plain in _plain(tensor) if tensor is not None else ():
                self._count(plain, kind)
                key = plain.untyped_storage()._cdata
                size, old = self._sizes[key]
                self.now.by_kind[old] -= size
                self.now.by_kind[kind] += size
                self._sizes[key] = size, kind

    def label_model(self, model: nn.Module) -> None:
        self.label([*model.parameters(), *model.buffers()], "parameters")

    def _count(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = size, _ = self._rounded(storage.nbytes()), kind
        self._add(size, kind)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        size, kind = self._sizes.pop(key, (0, "activations"))
        self._add(-size, kind)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 frees and refills gathered weights by resizing their storage."""
        key = storage._cdata
        if key in self._sizes:
            old, kind = self._sizes[key]
            self._sizes[key] = self._rounded(storage.nbytes()), kind
            self._add(self._sizes[key][0] - old, kind)

    def _rounded(self, size: int) -> int:
        return (size + self.block - 1) // self.block * self.block

    def _add(self, size: int, kind: str) -> None:
        self.now.by_kind[kind] += size
        if size > 0:
            self._note()

    def _note(self) -> None:
        device = self.now.device
        self.phase_peaks[self._phase] = max(self.phase_peaks[self._phase], device)
        self._window_peak = max(self._window_peak, device)
        self.host_peak = max(self.host_peak, self.now.by_kind["host"])
        if device > self.peak.device:
            self.peak, self.peak_phase = self.now.copy(), self._phase
        self.timeline.append((self._phase, device))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again with the local tensors
        if self._paused:
            return func(*args, **(kwargs or {}))
        workspace = self._rounded(workspace_bytes(func, args))
        if workspace:
            self._add(workspace, "workspace")
        result = func(*args, **(kwargs or {}))
        kind = "host" if func is _TO_HOST else self._kind
        made = [plain for leaf in tree_leaves(result) if isinstance(leaf, Tensor) for plain in _plain(leaf)]
        for tensor in made:
            self._count(tensor, kind)
        if func.namespace in _COLLECTIVES:
            self.label(made, "communication")
        if workspace:
            self._add(-workspace, "workspace")
        self.observe(func, args, result)
        return result

    def __enter__(self):
        self._original_resize = torch.UntypedStorage.resize_
        self._original_propagate = {}

        def resize(storage: torch.UntypedStorage, size: int):
            self._original_resize(storage, size)
            self._resized(storage)
            return storage

        torch.UntypedStorage.resize_ = resize
        for name in SHAPE_FINDERS:
            self._skip_during(ShardingPropagator, name)
        return super().__enter__()

    def __exit__(self, *exc_info):
        torch.UntypedStorage.resize_ = self._original_resize
        for name, original in self._original_propagate.items():
            setattr(ShardingPropagator, name, original)
        return super().__exit__(*exc_info)

    def _skip_during(self, cls: type, name: str) -> None:
        """DTensor finds out shapes by running operators on fake tensors of global shape, which nobody will hold."""
        original = self._original_propagate[name] = getattr(cls, name)

        def skipped(*args, **kwargs):
            self._paused += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._paused -= 1

        setattr(cls, name, skipped)


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors with memory behind a wrapper such as DTensor."""
    if isinstance(tensor, DTensor):
        return _plain(tensor._local_tensor)
    if isinstance(tensor, AsyncCollectiveTensor):
        return _plain(tensor.elem)
    if isinstance(tensor, Float8Weight):
        return [tensor.codes, tensor.scale]
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return [plain for name in names for plain in _plain(getattr(tensor, name))]
    return [tensor]
