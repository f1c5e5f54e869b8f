"""A group whose ranks are threads of this process that share one device: a thread has a stream of its own on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from xtuner import ops
from xtuner.ops import reference

TIMEOUT_S = 60.0


class Threads:
    """What W ranks have in common."""

    def __init__(self, world_size: int, device: torch.device):
        self.world_size, self.device = world_size, device
        self._barrier = threading.Barrier(world_size)
        self._said: list = [None] * world_size

    def gather(self, rank: int, mine):
        """Those of all ranks."""
        self._said[rank] = mine
        self._barrier.wait(TIMEOUT_S)
        said = list(self._said)
        self._barrier.wait(TIMEOUT_S)
        return said

    def group(self, rank: int, timeout_s: float = TIMEOUT_S) -> ops.DeviceEpGroup:
        def make_memory(num_bytes: int):
            memory = torch.full((num_bytes,), 0xFF, dtype=torch.uint8, device=self.device)  # NaN
            if memory.device.type == "cuda":
                torch.cuda.current_stream(memory.device).synchronize()
            return memory, self.gather(rank, memory.data_ptr())

        def all_gather(mine: bytes) -> list[bytes]:
            return self.gather(rank, mine)

        return ops.DeviceEpGroup(rank, self.world_size, all_gather, make_memory, self.device, timeout_s)

    def run(self, body: Callable) -> list:
        """body(rank) of all ranks at once; what they return, or the first error."""
        results: list = [None] * self.world_size
        errors: list[BaseException] = []

        def rank(r: int) -> None:
            try:
                if self.device.type == "cuda":
                    with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream(self.device)):
                        results[r] = body(r)
                        torch.cuda.current_stream().synchronize()
                else:
                    results[r] = body(r)
            except BaseException as error:  # noqa: BLE001  # raised below, in the thread of the test
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=rank, args=(r,)) for r in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


def draw(rank: int, world_size: int, hidden: int, experts: int, k: int, dtype: torch.dtype, seed: int):
    """Tokens (none on some ranks), choices skewed to low experts, weights, and a gradient of the result; on the CPU."""
    rng = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = (37, 0, 130, 1)[(rank + seed) % 4]
    idx = (torch.rand(tokens, k, generator=rng) ** 2 * experts).int()
    idx = idx.masked_fill(torch.rand(tokens, k, generator=rng) < 0.1, -1)
    x, dout = (torch.randn(tokens, hidden, generator=rng).to(dtype) for _ in range(2))
    return x, idx, torch.rand(tokens, k, generator=rng), dout


def step(threads: Threads, groups: list, inputs: list, experts: int, capacity: int | None = None) -> list[dict]:
    """Dispatch, experts that multiply by 1 + their number / 4, combine, and the gradients, on every rank."""

    def body(rank: int) -> dict:
        x, idx, weights, dout = (t.to(threads.device, copy=True) for t in inputs[rank])
        x.requires_grad_(), weights.requires_grad_()
        group, here = groups[rank], experts // threads.world_size
        route = ops.ep_prepare(idx, experts, group, capacity)
        rows = int(route.counts.view(threads.world_size, threads.world_size, -1).sum((0, 2)).max())
        group.reserve(2 * (max(rows, capacity or 0) * x.shape[1] * x.element_size() + 512))
        y = ops.ep_dispatch(x, route, group)
        expert = torch.arange(here, device=x.device).repeat_interleave(route.offsets.diff()) + rank * here
        factor = torch.zeros(y.shape[0], 1, device=x.device)
        factor[: expert.numel(), 0] = 1 + expert / 4
        out = ops.ep_combine(y * factor.to(y.dtype), route, group, weights)
        out.backward(dout)
        results = {"rows": y, "offsets": route.offsets, "out": out, "dx": x.grad, "dweights": weights.grad}
        return {name: t.detach().cpu() for name, t in results.items()}

    return threads.run(body)


def check_step(got: list[dict], inputs: list, experts: int, dtype: torch.dtype) -> None:
    """Rows bit for bit, sums within rounding, against plain torch in float64."""
    world = len(got)
    xs, idxs, weights, douts = (list(parts) for parts in zip(*inputs, strict=True))
    exact_xs = [x.double().requires_grad_() for x in xs]
    exact_weights = [w.double().requires_grad_() for w in weights]
    rows = reference.ep_dispatch(exact_xs, idxs, experts)
    ys = []
    for rank, wanted in enumerate(rows):
        offsets = got[rank]["offsets"]
        used = int(offsets[-1])
        assert used == len(wanted)
        assert torch.equal(got[rank]["rows"][:used].double(), wanted)
        assert not got[rank]["rows"][used:].any()
        expert = torch.arange(experts // world).repeat_interleave(offsets.diff()) + rank * (experts // world)
        ys.append(wanted * (1 + expert / 4).to(dtype).double()[:, None])
    outs = reference.ep_combine(ys, idxs, experts, exact_weights)
    torch.autograd.backward(outs, [d.double() for d in douts])
    rough = {"rtol": 2**-6, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    for rank, result in enumerate(got):
        for name, wanted in {"out": outs[rank], "dx": exact_xs[rank].grad}.items():
            torch.testing.assert_close(result[name].double(), wanted, **rough, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(
            result["dweights"].double(), exact_weights[rank].grad, rtol=2**-6, atol=rough["atol"] * 8
        )
