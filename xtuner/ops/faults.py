"""Bad values that kernels met on a GPU, where they cannot raise: they skip the value and note it in a word there."""

from __future__ import annotations

import torch

from xtuner import _C
from xtuner.ops._lib import OpError

_NONE = -1
_words: dict[torch.device, torch.Tensor] = {}


def watch_faults(device: torch.device | str) -> None:
    """Note bad values (an index out of range, maps that disagree) that ops meet on this GPU, for `raise_faults`.

    Call it once per GPU, before the first op and outside of CUDA graph capture.

    Raises:
        OpError: `device` is not a GPU.
    """
    word = torch.full((1,), _NONE, dtype=torch.int64, device=device)
    if word.device not in _words:
        _C.watch_faults(word)
        _words[word.device] = word


def raise_faults() -> None:
    """Raise what was noted since the last call; waits for the watched GPUs. Call it once a step, say.

    Raises:
        OpError: names the op, the argument and the smallest bad index.
    """
    for device, word in _words.items():
        value = int(word.item())
        word.fill_(_NONE)
        if value != _NONE:
            raise OpError(f"{_C.describe_fault(value)} (noted on {device})")
