"""Activations on the host between forward and backward, fetched one block ahead of their use."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from xtuner import ops


class HostStash:
    """Tensors that backward takes back in the opposite order. On a GPU copies run on a stream of their own."""

    def __init__(self) -> None:
        self._newest: weakref.ref[_Kept] | None = None  # autograd's graph owns what is kept
        self._stream: torch.cuda.Stream | None = None

    def keep(self, x: Tensor) -> AbstractContextManager:
        """While it is open, what autograd saves of `x` itself goes to the host."""
        storage, shape = x.untyped_storage()._cdata, x.shape

        def pack(saved: Tensor) -> Tensor | _Kept:
            same = saved.untyped_storage()._cdata == storage and saved.shape == shape
            return self._put(saved) if same else saved

        return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)

    def _put(self, x: Tensor) -> _Kept:
        if x.device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        kept = _Kept(x, self._newest, self._stream)
        self._newest = weakref.ref(kept)
        return kept


class _Kept:
    """One tensor on the host, and what was kept before it."""

    def __init__(self, x: Tensor, before: weakref.ref[_Kept] | None, stream: torch.cuda.Stream | None):
        self.device, self.before, self.stream = x.device, before, stream
        self.fetched: Tensor | None = None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(x.device))
            x.record_stream(stream)
        with _on(stream):
            self.host = ops.to_host(x.detach())

    def fetch(self) -> None:
        """Start the copy back, after those before it in the stream."""
        if self.fetched is None:
            with _on(self.stream):
                self.fetched = ops.to_device(self.host, self.device)

    def take(self) -> Tensor:
        self.fetch()
        x, self.fetched = self.fetched, None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)  # before the next fetch enters it
            x.record_stream(current)
        before = self.before() if self.before is not None else None
        if before is not None:
            before.fetch()
        return x


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _unpack(saved: Tensor | _Kept) -> Tensor:
    return saved.take() if isinstance(saved, _Kept) else saved
