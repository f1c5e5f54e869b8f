"""The machine's fp32 multiply-add peak, measured in registers. Needs the C compiler that built the core."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from pathlib import Path


def fma_peak_gflops(num_threads: int) -> float:
    """GFLOP/s of `num_threads` cores: one thread's best of five, times the threads (AVX2; no more on AVX-512 here)."""
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "fma_peak.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["cc", "-O2", "-mavx2", "-mfma", "-shared", "-fPIC", source, "-o", library], check=True)
        measure = ctypes.CDLL(library).fma_peak
        measure.restype = ctypes.c_double
        return max(measure() for _ in range(5)) * num_threads * 1e-9
