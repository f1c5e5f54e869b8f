"""What each rank of the expert-parallel tests does; apart from the tests, so that ranks import little."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from xtuner import ops
from xtuner.nn.moe import LocalDispatcher
from xtuner.ops import reference
from xtuner.parallel import AllToAllDispatcher, FusedDispatcher, leave_world

HIDDEN = 128


def join(rank: int, world_size: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root / 'rendezvous'}", rank=rank, world_size=world_size)


def draw(step: int, rank: int, world_size: int, dtype: torch.dtype):
    """Tokens and routing of a rank: even, all on one rank, on few experts, or none; some ranks have no tokens."""
    shared = torch.Generator().manual_seed(step)  # the same on all ranks
    kind, k, here = (int(torch.randint(n, (), generator=shared)) for n in (4, 4, 3))
    k, experts, hot = k + 1, (here + 1) * world_size, int(torch.randint(world_size, (), generator=shared))
    own = torch.Generator().manual_seed(1000 * step + rank)
    tokens = [0, 1, 33, 100][int(torch.randint(4, (), generator=own))] * (1 + step % 20)
    idx = torch.randint(experts, (tokens, k), generator=own)
    if kind == 1:
        idx = hot * (here + 1) + idx % (here + 1)
    if kind == 2:
        idx = (idx.float() / experts).pow(3).mul(experts).long()
    idx[torch.rand(tokens, k, generator=own) < 0.1] = -1
    x, dout = (torch.randn(tokens, HIDDEN, generator=own).to(dtype) for _ in range(2))
    return x, idx, torch.rand(tokens, k, generator=own), dout, experts


def run(dispatcher, scale_E, first_expert: int, x, idx, weights, dout, experts: int):
    """One differentiable step; expert e multiplies by scale_E[e]. Result and gradients of tokens, weights, experts."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    scale_E = scale_E.clone().requires_grad_()
    tokens = dispatcher.dispatch(x, idx, experts)
    here = tokens.offsets.numel() - 1
    expert_R = torch.arange(first_expert, first_expert + here).repeat_interleave(tokens.offsets.diff())
    rows = tokens.x if tokens.maps is None else ops.permute(tokens.x, *tokens.maps)
    y = rows[: expert_R.numel()] * scale_E[expert_R, None].to(x.dtype)
    y = torch.cat([y, y.new_zeros(rows.shape[0] - y.shape[0], y.shape[1])])
    out = dispatcher.combine(y, tokens, weights)
    out.backward(dout)
    return out.detach(), x.grad, weights.grad


def check_rows(dispatchers, step: int, rank: int, world_size: int, dtype: torch.dtype) -> None:
    """The rows of this rank's experts, exactly, from the tokens of all ranks."""
    xs, idxs, *_, experts = zip(*(draw(step, r, world_size, dtype) for r in range(world_size)), strict=True)
    expected = reference.ep_dispatch(xs, idxs, experts[0])[rank]
    for name, dispatcher in dispatchers.items():
        rows = dispatcher.dispatch(xs[rank], idxs[rank], experts[0])
        assert torch.equal(rows.x, expected), f"{name}: other rows on rank {rank} in step {step}"
        assert int(rows.offsets[-1]) == len(expected)
    group = dispatchers["fused"].group
    route = ops.ep_prepare(idxs[rank], experts[0], group)
    q, scale = ops.ep_dispatch_quantized(*ops.quantize_1x128(xs[rank]), route, group)
    expected_q, expected_scale = ops.quantize_1x128(expected)
    assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8)) and torch.equal(scale, expected_scale)


def same_as_local(rank: int, world_size: int, root: Path, steps: int) -> None:
    """Fused and all-to-all dispatchers against the local one, bit for bit, over loads that grow and shrink."""
    join(rank, world_size, root)
    rivals = {"fused": FusedDispatcher(timeout_s=60), "all_to_all": AllToAllDispatcher()}
    for step in range(steps):
        dtype = torch.bfloat16 if step % 2 else torch.float32
        *inputs, experts = draw(step, rank, world_size, dtype)
        scale_E = torch.linspace(-1, 1, experts)
        check_rows(rivals, step, rank, world_size, dtype)
        expected = run(LocalDispatcher(), scale_E, 0, *inputs, experts)
        for name, dispatcher in rivals.items():
            got = run(dispatcher, scale_E, rank * experts // world_size, *inputs, experts)
            for what, a, b in zip(("out", "dx", "dweights"), got, expected, strict=True):
                assert torch.equal(a, b), f"{name}: {what} differs on rank {rank} in step {step}"
    dist.barrier()
    leave_world()


def die_in_mid_step(rank: int, world_size: int, root: Path) -> None:
    """Rank 1 is killed between dispatch and combine; the others must raise. What they say goes to root/rank.txt."""
    join(rank, world_size, root)
    dispatcher = FusedDispatcher(timeout_s=1)
    x, idx, weights = torch.randn(8, 4), torch.arange(16).view(8, 2) % world_size, torch.rand(8, 2)
    try:
        for step in range(100):
            tokens = dispatcher.dispatch(x, idx, world_size)
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            dispatcher.combine(tokens.x, tokens, weights)
    except ops.OpError as error:
        (root / f"{rank}.txt").write_text(str(error))
    os._exit(0)  # leaving the process group would wait for the dead rank
