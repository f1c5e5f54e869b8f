"""How fast memory takes plain and streaming stores, found by filling it. Needs the C compiler that built the core."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import torch


@cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        compiled = Path(directory) / "store_peak.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["cc", "-O2", "-mavx2", "-shared", "-fPIC", source, "-o", compiled], check=True)
        return ctypes.CDLL(compiled)


@cache
def pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads)


def fill(store: Callable, parts: list[tuple[int, int]]) -> None:
    """`parts` of memory, each an address and bytes, by a thread of its own; ctypes lets go of the interpreter lock."""
    others = [pool(len(parts)).submit(store, ctypes.c_void_p(at), ctypes.c_long(size)) for at, size in parts[1:]]
    at, size = parts[0]
    store(ctypes.c_void_p(at), ctypes.c_long(size))
    for other in others:
        other.result()


def store_calls(out: torch.Tensor, num_threads: int) -> dict[str, Callable]:
    """Calls that fill `out`, aligned to 64 bytes, in equal parts: by plain and streaming stores."""
    size = out.nbytes // num_threads // 64 * 64
    parts = [(out.data_ptr() + i * size, size) for i in range(num_threads)]
    kinds = {"plain stores": library().store_plain, "streaming stores": library().store_stream}
    return {name: partial(fill, store, parts) for name, store in kinds.items()}
