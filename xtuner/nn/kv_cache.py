"""Keys and values of tokens already seen, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Room for `max_length` tokens of each of `num_sequences` sequences in every layer.

    One decoder call appends the new tokens of all sequences (packed, bounded by cu_seqlens): each layer calls
    `append`, then the decoder calls `advance` once.
    """

    def __init__(
        self,
        num_layers: int,
        num_sequences: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        shape = (num_layers, num_sequences, max_length, num_kv_heads, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.lengths = [0] * num_sequences

    def append(self, layer: int, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Store new keys and values [T, Hkv, D]; return all of them packed, with their cu_seqlens and longest length.

        Raises:
            ValueError: a sequence outgrows max_length.
        """
        bounds = cu_seqlens.tolist()
        totals = [old + last - first for old, first, last in zip(self.lengths, bounds[:-1], bounds[1:], strict=True)]
        if max(totals) > self.keys.shape[2]:
            raise ValueError(f"max_length={self.keys.shape[2]} of the KV cache is exceeded: {max(totals)} tokens")
        for s, total in enumerate(totals):
            self.keys[layer, s, self.lengths[s] : total] = k[bounds[s] : bounds[s + 1]]
            self.values[layer, s, self.lengths[s] : total] = v[bounds[s] : bounds[s + 1]]
        packed = (torch.cat([store[layer, s, :n] for s, n in enumerate(totals)]) for store in (self.keys, self.values))
        cu_k = torch.tensor([0, *totals], dtype=torch.int32, device=cu_seqlens.device).cumsum(0, dtype=torch.int32)
        return *packed, cu_k, max(totals)

    def advance(self, cu_seqlens: Tensor) -> None:
        self.lengths = [n + new for n, new in zip(self.lengths, cu_seqlens.diff().tolist(), strict=True)]
