"""A training step of a small mixture of experts with memory techniques: what it keeps, and its gradient.

As a program (arguments: JSON of MemoryConfig's fields, tokens) it prints the growth of its peak resident memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtuner.config import MemoryConfig, ModelConfig, OptimConfig
from xtuner.models import build_model
from xtuner.optim import build_adamw, keep_state_on_host
from xtuner.parallel.recompute import recompute_blocks
from xtuner.plan.tracker import MemoryTracker

ARCH = ModelConfig.parse({
    "family": "qwen3_moe", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
    "moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
})  # fmt: skip


def saved_per_token(arch: ModelConfig) -> int:
    """Numbers that one block keeps of a token for its backward, counted by hand."""
    dim, q, kv = arch.hidden_size, arch.num_attention_heads, arch.num_key_value_heads
    norms = 2 * dim + 2 * dim  # inputs and results of both; the router and the experts share the second's result
    attention = (q + kv + q + 2 * kv + q) * arch.head_dim + q  # before and after rotation, values, result, logsumexp
    k, width = arch.moe.num_experts_per_tok, arch.moe.moe_intermediate_size
    experts = k * (2 * width + width + dim)  # gate and up, their product, result
    return norms + attention + experts + 3 * arch.moe.num_experts


class Trial:
    """The model, and `steps` on it under a tracker that counts exact bytes."""

    def __init__(self, tokens: int, **memory: Any):
        cfg = MemoryConfig(**memory)
        self.model = recompute_blocks(build_model(ARCH), cfg)
        self.model.init_weights(0)
        self.optimizer = build_adamw(self.model, OptimConfig())
        if cfg.offload_optimizer:
            keep_state_on_host(self.optimizer)
        ids = torch.randint(ARCH.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
        cu = torch.arange(0, tokens + 1, 64, dtype=torch.int32)
        self.batch = (ids, (torch.arange(tokens) % 64)[None], cu, 64)
        self.weights = torch.full((tokens,), 1 / tokens)

    def step(self) -> list[Tensor]:
        loss = self.forward()
        loss.backward()
        return self.update()

    def forward(self) -> Tensor:
        output = self.model(*self.batch, labels=self.batch[0], loss_weights=self.weights)
        return output.loss_sum + 1e-3 * sum(s.z_sum for s in output.stats) / len(self.weights)

    def update(self) -> list[Tensor]:
        gradient = [p.grad for p in self.model.parameters()]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return gradient

    def tracked(self) -> MemoryTracker:
        """The tracker after two steps, each in phases forward, kept (what forward leaves to backward), backward, …"""
        tracker = MemoryTracker(block=1)
        tracker.label_model(self.model)
        with tracker:
            for _ in range(2):
                with tracker.phase("forward"):
                    loss = self.forward()
                with tracker.phase("kept"):
                    pass
                with tracker.phase("backward"):
                    loss.backward()
                del loss
                tracker.label((p.grad for p in self.model.parameters()), "gradients")
                with tracker.phase("update", "optimizer"):
                    self.update()
                with tracker.phase("between"):
                    pass
        return tracker


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    Trial(64).step()  # what libraries allocate once
    trial = Trial(int(sys.argv[2]), **json.loads(sys.argv[1]))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    trial.step()
    print(resident("VmHWM") - before)
