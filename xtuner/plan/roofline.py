"""Time of operators and collectives on a device: the slower of arithmetic and memory, each at a part of its peak.

Efficiencies are those of devices.toml. Operators follow each other on a device; FSDP's gathers and reductions, and
copies to and from the host, run beside them; the exchanges of expert and sequence parallelism do not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from xtuner.plan.device import EFFICIENCY, Device
from xtuner.plan.internals import CollectiveOp, non_functional_collectives, sync_ops

aten, ours, c10d = torch.ops.aten, torch.ops.xtuner, torch.ops.c10d
_VIEWS = ("view", "t", "detach", "alias", "slice", "select", "split", "expand", "transpose", "unsqueeze", "as_strided",
          "_unsafe_view", "empty", "new_empty", "empty_like", "chunk", "permute", "squeeze", "unbind",
          "split_with_sizes", "wait_tensor", "unfold")  # fmt: skip
_HOST_COPIES = (ours.to_host.default, ours.to_device.default)
BESIDE = ("gather", "host")  # FSDP2's collectives, copies between host and device
_OVERLAPPED = {c10d._allgather_base_.default, c10d._reduce_scatter_base_.default, c10d.allreduce_.default}


def arithmetic(func: torch._ops.OpOverload, args: Sequence[Any], result: Any) -> tuple[float, str] | None:
    """Floating-point operations and the entry of EFFICIENCY they run at; None: nothing but memory counts."""
    name = func.overloadpacket
    if name in (aten.mm, ours.linear, ours.linear_dgrad):
        return 2.0 * result.numel() * args[0].shape[1], "dense"
    if name in (ours.linear_qkv, ours.linear_qkv_bwd):
        backward = name is ours.linear_qkv_bwd
        directions, (x, *weights) = (int(args[7]) + int(args[8]), args[3:7]) if backward else (1, args)
        return 2.0 * directions * x.shape[0] * sum(w.numel() for w in weights), "dense"
    if name is ours.linear_wgrad:
        return 2.0 * result.numel() * args[0].shape[0], "dense"
    if name is aten.bmm:
        return 2.0 * result.numel() * args[0].shape[2], "dense"
    if name is aten.addmm:
        return 2.0 * result.numel() * args[1].shape[1], "dense"
    if name is ours.linear_cross_entropy:
        products = 1 + int(args[4]) + int(args[5])
        return 2.0 * products * args[0].numel() * args[1].shape[0], "dense"
    if name in (ours.gemm_m_grouped, ours.gemm_m_grouped_swiglu, ours.gemm_m_grouped_dswiglu):
        out = result[0] if isinstance(result, (tuple, list)) else result
        rows, weight = out.shape[0], args[1]
        return 2.0 * rows * weight.shape[1] * weight.shape[2], "grouped"
    if name in (ours.gemm_k_grouped, ours.gemm_k_grouped_):
        return 2.0 * _rows(args) * math.prod((result if name is ours.gemm_k_grouped else args[0]).shape[1:]), "grouped"
    if name is ours.gemm_m_grouped_fp8:
        a, weight = args[0], args[2]
        return 2.0 * a.numel() * weight.shape[1], "dense_fp8" if weight.shape[0] == 1 else "grouped_fp8"
    if name in (ours.gemm_k_grouped_fp8, ours.gemm_k_grouped_fp8_):
        a, _, b, _, offsets = args[:5] if name is ours.gemm_k_grouped_fp8 else args[1:6]
        # Columns are tokens, and room to pad every expert's.
        return 2.0 * a.numel() * b.shape[0], "dense_fp8" if offsets.shape[0] == 2 else "grouped_fp8"
    if name is ours.attention:
        return _attention(*args[:3], args[5]), "attention"
    if name is ours.attention_bwd:
        return 2.5 * _attention(*args[1:4], args[8]), "attention_backward"
    return None


def _rows(args: Sequence[Any]) -> int:
    """The longer of two grouped operands; the other may be read through a map."""
    tensors = [a for a in args if isinstance(a, Tensor) and a.dim() == 2 and a.is_floating_point()]
    return max(t.shape[0] for t in tensors)


def _attention(q: Tensor, k: Tensor, v: Tensor, longest: int) -> float:
    """Causal, documents all as long as the longest."""
    return 2.0 * q.shape[0] * longest / 2 * q.shape[1] * (q.shape[2] + v.shape[2])


def touched_bytes(func: torch._ops.OpOverload, args: Sequence[Any], result: Any) -> int:
    """Read and written once each."""
    if func.overloadpacket._qualified_op_name.split("::")[1] in _VIEWS:
        return 0
    tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


class Clock:
    """Adds up a rank's time by phase and what its collectives move.

    seconds   (phase, what) -> seconds; what is an entry of EFFICIENCY or "exchange" (waited for), or one of BESIDE
    traffic   (collective, link) -> bytes that this rank sends
    """

    def __init__(self, device: Device):
        self.device = device
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.traffic: dict[tuple[str, str], float] = defaultdict(float)
        self.flops = 0.0

    def run(self, phase: str, func: torch._ops.OpOverload, args: Sequence[Any], result: Any) -> None:
        if func in sync_ops:
            return
        if func in non_functional_collectives:
            self._collective(phase, func, args, result)
            return
        if func in _HOST_COPIES:
            self.seconds[phase, "host"] += touched_bytes(func, args, ()) / (self.device.host * 1e9 * EFFICIENCY["host"])
            return
        work, memory = arithmetic(func, args, result), touched_bytes(func, args, result)
        at_memory = memory / (self.device.hbm * 1e9 * EFFICIENCY["memory"])
        if work is None:
            self.seconds[phase, "memory"] += at_memory
            return
        flops, kind = work
        self.flops += flops
        rate = self.device.fp8 if kind.endswith("fp8") else self.device.bf16
        at_peak = flops / (rate * 1e12 * EFFICIENCY[kind])
        self.seconds[phase, kind] += max(at_peak, at_memory)

    def _collective(self, phase: str, func: torch._ops.OpOverload, args: Sequence[Any], result: Any) -> None:
        ranks = dist.get_process_group_ranks(CollectiveOp.get_process_group(func, args))
        count, size = len(ranks), CollectiveOp.get_comm_tensor_size(func, result, args, None)
        nodes = len({rank // self.device.per_node for rank in ranks})
        rounds = 2 if func is c10d.allreduce_.default else 1  # a reduction, then a gather
        within = rounds * size * (count - 1) / count
        # A ring enters and leaves each node once, over all its devices' network ports; an exchange goes straight.
        per_node = count / nodes
        straight = func is c10d.alltoall_base_.default
        across = rounds * size * (nodes - 1) / nodes / (1 if straight else per_node)
        name = func.overloadpacket._qualified_op_name.split("::")[1].strip("_")
        self.traffic[name, "link"] += within - (across if straight else 0)
        self.traffic[name, "network"] += across
        seconds = max(within / (self.device.link * 1e9), across / (self.device.network * 1e9))
        seconds /= EFFICIENCY["collective"]
        self.seconds[phase, "gather" if func in _OVERLAPPED else "exchange"] += seconds

    def step_seconds(self) -> float:
        return step_seconds(self.seconds)


def step_seconds(seconds: Mapping[tuple[str, str], float]) -> float:
    """Phases follow each other; in each, what is of BESIDE runs beside the rest."""
    total = 0.0
    for phase in {phase for phase, _ in seconds}:
        parts = {what: s for (p, what), s in seconds.items() if p == phase}
        beside = [parts.pop(what, 0.0) for what in BESIDE]
        total += max(sum(parts.values()), *beside)
    return total
