"""Mixture of experts: router -> dispatch -> experts -> combine."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from xtuner import ops
from xtuner.config import MoEConfig
from xtuner.nn.grouped_router import GroupedRouter
from xtuner.nn.mlp import MLP
from xtuner.nn.router import Router, RouterStats


class Dispatched(Protocol):
    """Tokens on the rank of their experts, grouped by local expert; a dispatcher adds what the way back needs."""

    @property
    def x(self) -> Tensor: ...  # [R, D], or with `maps` [T, D]

    @property
    def offsets(self) -> Tensor: ...  # int64 [E+1], E experts on this rank

    @property
    def maps(self) -> tuple[Tensor, Tensor] | None: ...  # row_of [T, K] and src [R]: x is grouped only when it is read

    @property
    def group(self) -> ops.EpGroup | None: ...  # whose memory the experts' results are best put into


Experts = Callable[[Dispatched], Tensor]


class TokenDispatcher(Protocol):
    """Brings tokens to their experts and results back. Expert parallelism is another implementation of this."""

    def run(
        self, experts: Experts, x_TD: Tensor, topk_idx_TK: Tensor, weights_TK: Tensor, num_experts: int
    ) -> Tensor: ...  # combine(experts(dispatch(x))), or the same in parts

    def steps(
        self, experts: Experts, x_TD: Tensor, topk_idx_TK: Tensor, weights_TK: Tensor, num_experts: int
    ) -> Generator[None, None, Tensor]: ...  # the same, pausing while rows travel; see `interleave`

    def dispatch(self, x_TD: Tensor, topk_idx_TK: Tensor, num_experts: int) -> Dispatched: ...

    def combine(self, y_RD: Tensor, dispatched: Dispatched, weights_TK: Tensor) -> Tensor: ...


class LocalRows(NamedTuple):
    x: Tensor
    offsets: Tensor
    maps: tuple[Tensor, Tensor]
    group: None = None


class LocalDispatcher:
    """All experts are here."""

    def run(
        self, experts: Experts, x_TD: Tensor, topk_idx_TK: Tensor, weights_TK: Tensor, num_experts: int
    ) -> Tensor:
        tokens = self.dispatch(x_TD, topk_idx_TK, num_experts)
        return self.combine(experts(tokens), tokens, weights_TK)

    def steps(self, *args) -> Generator[None, None, Tensor]:
        yield from ()  # nothing travels
        return self.run(*args)

    def dispatch(self, x_TD: Tensor, topk_idx_TK: Tensor, num_experts: int) -> LocalRows:
        _, offsets, *maps = ops.route_map(topk_idx_TK, num_experts)
        return LocalRows(x_TD, offsets, tuple(maps))

    def combine(self, y_RD: Tensor, dispatched: LocalRows, weights_TK: Tensor) -> Tensor:
        return ops.unpermute(y_RD, *dispatched.maps, weights_TK)


class MoE(nn.Module):
    """A dropless top-k mixture of SwiGLU experts, beside shared experts that every token visits where there are any.

    Parameters are 2-D so that FSDP2 shards them evenly at any world size: w13 [E*2*I, D] (per expert gate rows, then
    up rows) and w2 [E*D, I].
    """

    fp8 = False

    def __init__(self, hidden_size: int, cfg: MoEConfig):
        super().__init__()
        self.num_experts = cfg.num_experts
        self.stacked = {"w13": 2 * cfg.num_experts, "w2": cfg.num_experts}  # matrices in one parameter
        if cfg.scoring == "sigmoid":
            self.gate = GroupedRouter(hidden_size, cfg)
        else:
            self.gate = Router(
                hidden_size, cfg.num_experts, cfg.num_experts_per_tok, cfg.norm_topk_prob, cfg.choice_bias
            )
        self.w13 = nn.Parameter(torch.empty(cfg.num_experts * 2 * cfg.moe_intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(cfg.num_experts * hidden_size, cfg.moe_intermediate_size))
        shared = cfg.num_shared_experts * cfg.moe_intermediate_size
        self.shared = MLP(hidden_size, shared) if shared else None
        self.dispatcher: TokenDispatcher = LocalDispatcher()
        self.to_local: Callable[[Tensor], Tensor] = lambda weight: weight  # the rows of the experts on this rank

    def forward(self, x_TD: Tensor, topk_idx: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        weights_TK, idx_TK, stats = self.gate(x_TD, topk_idx)
        out_TD = self.dispatcher.run(self.experts, x_TD, idx_TK, weights_TK, self.num_experts)
        return out_TD if self.shared is None else out_TD + self.shared(x_TD), stats

    def steps(self, x_TD: Tensor, topk_idx: Tensor | None) -> Generator[None, None, tuple[Tensor, RouterStats]]:
        """What forward does, pausing while tokens travel."""
        weights_TK, idx_TK, stats = self.gate(x_TD, topk_idx)
        out_TD = yield from self.dispatcher.steps(self.experts, x_TD, idx_TK, weights_TK, self.num_experts)
        return out_TD if self.shared is None else out_TD + self.shared(x_TD), stats

    def experts(self, tokens: Dispatched) -> Tensor:
        """The results [R, D] of this rank's experts on the rows they were given."""
        if self.fp8:
            h = ops.linear_fp8(tokens.x, self.to_local(self.w13), tokens.offsets, maps=tokens.maps)
            return ops.linear_fp8(h, self.to_local(self.w2), tokens.offsets, gated=True)
        here = tokens.offsets.numel() - 1
        w13, w2 = (self.to_local(w).unflatten(0, (here, -1)) for w in (self.w13, self.w2))
        return ops.grouped_mlp(tokens.x, w13, w2, tokens.offsets, tokens.maps, tokens.group)
