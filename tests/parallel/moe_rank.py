"""What each rank of the tests of MoE blocks with experts on other ranks does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from xtuner.config import MoEConfig
from xtuner.nn.moe import MoE
from xtuner.ops import OpError
from xtuner.parallel import AllToAllDispatcher, FusedDispatcher, World, check_overflow, init_world, leave_world
from xtuner.parallel.dispatch_presum import PresumDispatcher

HIDDEN, EXPERTS, TOP_K = 16, 8, 3
KINDS = {"fused": FusedDispatcher, "all_to_all": AllToAllDispatcher, "presum": PresumDispatcher}


def make_moe() -> MoE:
    torch.manual_seed(0)
    moe = MoE(HIDDEN, MoEConfig(num_experts=EXPERTS, num_experts_per_tok=TOP_K, moe_intermediate_size=12))
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(0, 0.3)
    return moe


def split_moe(world: World, kind: str, bounds: dict[str, Any]) -> MoE:
    """The same block with this rank's experts alone."""
    moe = make_moe()
    for name in ("w13", "w2"):
        rows = getattr(moe, name).detach().chunk(world.size)[world.rank].clone()
        setattr(moe, name, torch.nn.Parameter(rows))
    moe.dispatcher = KINDS[kind](**bounds)
    return moe


def draw(load: str, rank: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of a rank and their experts: chosen evenly, all on rank 0, half of them on one expert, by rank 1 alone."""
    generator = torch.Generator().manual_seed(rank)
    if load == "unequal":
        tokens = [tokens, 0, 1, 2 * tokens][rank]
    if load == "one rank has all":
        tokens = tokens if rank == 1 else 0
    x = torch.randn(tokens, HIDDEN, generator=generator)
    idx = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    if load == "all to rank 0":
        idx %= 2
    if load == "one expert":
        idx[::2] = 5
    return x, idx


def run(moe: MoE, x, idx) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y, _ = moe(x, idx)
    y.square().sum().backward()
    return [y.detach(), x.grad, moe.gate.weight.grad, moe.w13.grad, moe.w2.grad]


def like_local(kind: str, bounds: dict[str, Any], load: str, tokens: int, most_rows: int | None) -> None:
    """Forward and the gradients of what is here have the bits of a block with all experts (but with `presum`, which
    rounds otherwise, twice alike); the experts have the same gradient."""
    world = init_world("cpu", num_threads=1)
    try:
        x, idx = draw(load, world.rank, tokens)
        *expected, w13, w2 = run(make_moe(), x, idx)
        moe, rows = split_moe(world, kind, bounds), []
        experts = moe.experts
        moe.experts = lambda tokens: rows.append(tokens.x.shape[0]) or experts(tokens)
        *got, mine13, mine2 = run(moe, x, idx)
        moe.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(run(moe, x, idx), [*got, mine13, mine2], strict=True))
        for what, a, b in zip(("output", "gradient of tokens", "gradient of the router"), got, expected, strict=True):
            if kind == "presum":
                assert (a - b).norm() <= 1e-6 * b.norm(), what
            else:
                assert torch.equal(a, b), what
        for whole, mine in ((w13, mine13), (w2, mine2)):
            dist.all_reduce(whole)
            want = whole.chunk(world.size)[world.rank]
            assert (mine - want).norm() <= 1e-6 * want.norm(), "gradient of experts"
        if most_rows is not None:
            assert max(rows) <= most_rows and len(rows) > 4, rows  # rounds run again in backward
        check_overflow(SimpleNamespace(layers=[SimpleNamespace(is_moe=True, moe=moe)]), world)
    finally:
        leave_world()


def refused(kind: str, bounds: dict[str, Any], load: str, tokens: int) -> str:
    """What a step says that must fail on every rank."""
    world = init_world("cpu", num_threads=1)
    try:
        moe = split_moe(world, kind, bounds)
        run(moe, *draw(load, world.rank, tokens))
        check_overflow(SimpleNamespace(layers=[SimpleNamespace(is_moe=True, moe=moe)]), world)
        return "nothing"
    except OpError as error:
        return str(error)
    finally:
        leave_world()
