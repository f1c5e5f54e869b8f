"""Bad values noted on a GPU, without one: the word is read and turned into an error."""

import pytest
import torch

from xtuner import _C
from xtuner.ops import OpError, faults


def test_a_word_becomes_an_error_and_is_cleared(monkeypatch):
    word = torch.tensor([5 << 56 | 77])  # unpermute_bwd, index 77
    monkeypatch.setattr(faults, "_words", {word.device: word})
    message = r"unpermute_bwd: src and row_of must be each other's inverse, but differ at index 77 \(noted on cpu\)"
    with pytest.raises(OpError, match=message):
        faults.raise_faults()
    assert word.item() == -1
    faults.raise_faults()


def test_only_a_gpu_can_be_watched():
    with pytest.raises(OpError, match="watch_faults: word must be one int64 on a GPU"):
        faults.watch_faults("cpu")
    assert _C.describe_fault(-1) == "not a fault: 18446744073709551615"


def test_the_cpu_needs_no_workspace():
    assert _C.route_map_workspace_size(torch.zeros(100, 8, dtype=torch.int32), 64) == 0
