"""The projections to queries, keys and values: three products of one input, whose gradient is summed on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import OpError, autograd, define, once_differentiable
from xtuner.ops.linear import linear, runs_in_core


def linear_qkv(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x @ wq^T, x @ wk^T and x @ wv^T: `linear` thrice, at one operator's cost where the core multiplies.

    Args:
        x: [T, D]; wq: [Nq, D]; wk: [Nk, D]; wv: [Nv, D]. All of one floating dtype.

    Returns:
        [T, Nq], [T, Nk], [T, Nv] in the dtype of x.

    Raises:
        OpError: shapes or dtypes that do not fit together.
    """
    if not runs_in_core(x.device, x.dtype, x.shape[:-1].numel()):
        return linear(x, wq), linear(x, wk), linear(x, wv)
    for name, w in (("wq", wq), ("wk", wk), ("wv", wv)):
        if x.dim() != 2 or w.dim() != 2 or x.shape[1] != w.shape[1]:
            raise OpError(f"linear_qkv: x {list(x.shape)} must be [T, D] and {name} {list(w.shape)} [N, D]")
    return torch.ops.xtuner.linear_qkv(x, wq, wk, wv)


def _fake(x, wq, wk, wv):
    return tuple(x.new_empty(x.shape[0], w.shape[0]) for w in (wq, wk, wv))


def _one_group(x: Tensor) -> Tensor:
    return torch.tensor([0, x.shape[0]], device=x.device)


def _linear_qkv(x, wq, wk, wv):
    outs = _fake(x, wq, wk, wv)
    x, group, threads = x.contiguous(), _one_group(x), torch.get_num_threads()
    for out, w in zip(outs, (wq, wk, wv), strict=True):
        _C.gemm_m_grouped(x, w.contiguous()[None], group, True, out=out, num_threads=threads)
    return outs


def _fake_bwd(dq, dk, dv, x, wq, wk, wv, want_dx: bool, want_dw: bool):
    dx = x.new_empty(x.shape if want_dx else (0,))
    return dx, *(w.new_empty(w.shape if want_dw else (0,)) for w in (wq, wk, wv))


def _linear_qkv_bwd(dq, dk, dv, x, wq, wk, wv, want_dx: bool, want_dw: bool):
    dx, *dws = grads = _fake_bwd(dq, dk, dv, x, wq, wk, wv, want_dx, want_dw)
    x, group, threads = x.contiguous(), _one_group(x), torch.get_num_threads()
    for i, (dout, w, dw) in enumerate(zip((dq, dk, dv), (wq, wk, wv), dws, strict=True)):
        dout = dout.contiguous()
        if want_dx:
            w = w.contiguous()[None]
            _C.gemm_m_grouped(dout, w, group, False, accumulate=i > 0, out=dx, num_threads=threads)
        if want_dw:
            _C.gemm_k_grouped(dout, x, group, 0.0, out=dw[None], num_threads=threads)
    return grads


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
    want_dx, *want_dws = ctx.needs_input_grad[:4]
    grads = torch.ops.xtuner.linear_qkv_bwd(dq, dk, dv, *ctx.saved_tensors, want_dx, any(want_dws))
    return tuple(g if wanted else None for g, wanted in zip(grads, (want_dx, *want_dws), strict=True))


_WEIGHTS = "Tensor wq, Tensor wk, Tensor wv"
define(f"linear_qkv(Tensor x, {_WEIGHTS}) -> (Tensor, Tensor, Tensor)", _linear_qkv, _fake)
define(
    f"linear_qkv_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor x, {_WEIGHTS}, bool want_dx, bool want_dw) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _linear_qkv_bwd,
    _fake_bwd,
)
autograd("linear_qkv", _backward, _setup)
once_differentiable("linear_qkv_bwd")
