"""What attention needs of tokens already seen, for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner.config import ModelConfig


class KVCache:
    """Room for `max_length` tokens of each of `num_sequences` sequences in every layer of a model.

    Of a token it keeps keys and values [Hkv, D] each; with latent attention the latent that both are made of, and the
    rotated key that all heads share. One decoder call appends the new tokens of all sequences (packed, bounded by
    cu_seqlens): each layer calls `append`, then the decoder calls `advance` once.
    """

    def __init__(
        self, cfg: ModelConfig, num_sequences: int, max_length: int, dtype: torch.dtype, device: torch.device | str
    ):
        if cfg.mla is None:
            features = ((cfg.num_key_value_heads, cfg.head_dim),) * 2
        else:
            features = ((cfg.mla.kv_lora_rank,), (1, cfg.mla.qk_rope_head_dim))
        room = (cfg.num_hidden_layers, num_sequences, max_length)
        self.stores = tuple(torch.empty(*room, *shape, dtype=dtype, device=device) for shape in features)
        self.max_length = max_length
        self.lengths = [0] * num_sequences

    def append(self, layer: int, new: tuple[Tensor, Tensor], cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Store both tensors [T, ...] of new tokens; return those of all tokens packed, with their cu_seqlens and
        longest length.

        Raises:
            ValueError: a sequence outgrows max_length.
        """
        bounds = cu_seqlens.tolist()
        totals = [old + last - first for old, first, last in zip(self.lengths, bounds[:-1], bounds[1:], strict=True)]
        if max(totals) > self.max_length:
            raise ValueError(f"max_length={self.max_length} of the KV cache is exceeded: {max(totals)} tokens")
        for store, x in zip(self.stores, new, strict=True):
            for s, total in enumerate(totals):
                store[layer, s, self.lengths[s] : total] = x[bounds[s] : bounds[s + 1]]
        packed = (torch.cat([store[layer, s, :n] for s, n in enumerate(totals)]) for store in self.stores)
        cu_k = torch.tensor([0, *totals], dtype=torch.int32, device=cu_seqlens.device).cumsum(0, dtype=torch.int32)
        return *packed, cu_k, max(totals)

    def advance(self, cu_seqlens: Tensor) -> None:
        self.lengths = [n + new for n, new in zip(self.lengths, cu_seqlens.diff().tolist(), strict=True)]
