"""Runs a benchmark as on a processor with fewer instructions: for torch, for oneDNN and MKL under it, and for us."""

from __future__ import annotations

import os
import sys

# torch, oneDNN and MKL read these when they are loaded.
SETTINGS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def run_as(isa: str | None) -> str:
    """Start this program again with the settings for `isa`, unless they are in force; then force our own kernels too.

    Returns the name for the report; "native" without an `isa`.
    """
    if isa is None:
        return "native"
    if any(os.environ.get(name) != value for name, value in SETTINGS[isa].items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS[isa])
    import torch

    from xtuner import _C

    _C.force_isa(isa)
    # Both are what the settings are for; a newer torch may stop to heed them.
    if torch.backends.cpu.get_cpu_capability().lower() != isa or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise RuntimeError(f"asked torch for {isa}, got {torch.backends.cpu.get_cpu_capability()}")
    return isa
