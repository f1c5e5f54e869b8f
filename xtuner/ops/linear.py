"""The dense product of a projection or the head, with both gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xtuner import _C
from xtuner.ops._lib import OpError, autograd, define, once_differentiable

# Whether torch multiplies bfloat16 matrices fast on this processor, which it leaves to oneDNN. Where oneDNN has no
# bfloat16 instructions to use (AVX512-BF16, AMX, Arm's BF16), torch falls back to loops that are 6 to 100 times slower
# than float32.
_TORCH_HAS_BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# With fewer rows torch's float32 product, of a vector then, is up to 4 times as fast; from here on the core's is 1.0 to
# 1.4 times (bench/ops/bench_linear.py).
_FEWEST_ROWS = 8


def runs_in_core(device: torch.device, dtype: torch.dtype, num_rows: int) -> bool:
    """The one rule that picks who multiplies: the core on CPU, but neither few rows of float32 nor bfloat16 where torch
    has instructions for it.
    """
    if device.type != "cpu":
        return False
    if dtype == torch.float32:
        return num_rows >= _FEWEST_ROWS
    return dtype == torch.bfloat16 and not _TORCH_HAS_BF16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias: torch's own product, or ours where `runs_in_core` says so; the gradients likewise.

    Args:
        x: [..., D]; weight: [N, D]; bias: [N]. All of one floating dtype; accumulated in float32 in the core.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        OpError: shapes or dtypes that do not fit together.
    """
    if not runs_in_core(x.device, x.dtype, x.shape[:-1].numel()):
        return F.linear(x, weight, bias)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise OpError(f"linear: x {list(x.shape)} must end in the width of weight {list(weight.shape)}")
    out = torch.ops.xtuner.linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _one_group(x: Tensor) -> Tensor:
    return torch.tensor([0, x.shape[0]], device=x.device)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    out = _fake(x, weight)
    x, weight = x.contiguous(), weight.contiguous()
    _C.gemm_m_grouped(x, weight[None], _one_group(x), True, out=out, num_threads=torch.get_num_threads())
    return out


def _fake_dgrad(dout: Tensor, weight: Tensor) -> Tensor:
    return dout.new_empty(dout.shape[0], weight.shape[1])


def _linear_dgrad(dout: Tensor, weight: Tensor) -> Tensor:
    dx = _fake_dgrad(dout, weight)
    dout, weight = dout.contiguous(), weight.contiguous()
    _C.gemm_m_grouped(dout, weight[None], _one_group(dout), False, out=dx, num_threads=torch.get_num_threads())
    return dx


def _fake_wgrad(dout: Tensor, x: Tensor) -> Tensor:
    return dout.new_empty(dout.shape[1], x.shape[1])


def _linear_wgrad(dout: Tensor, x: Tensor) -> Tensor:
    dweight = _fake_wgrad(dout, x)
    dout, x = dout.contiguous(), x.contiguous()
    _C.gemm_k_grouped(dout, x, _one_group(x), 0.0, out=dweight[None], num_threads=torch.get_num_threads())
    return dweight


def _setup(ctx, inputs, output) -> None:
    x, weight = inputs
    # Each side is kept for the other's gradient alone.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)


def _backward(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    dx = torch.ops.xtuner.linear_dgrad(grad, weight) if ctx.needs_input_grad[0] else None
    dweight = torch.ops.xtuner.linear_wgrad(grad, x) if ctx.needs_input_grad[1] else None
    return dx, dweight


define("linear(Tensor x, Tensor weight) -> Tensor", _linear, _fake)
define("linear_dgrad(Tensor dout, Tensor weight) -> Tensor", _linear_dgrad, _fake_dgrad)
define("linear_wgrad(Tensor dout, Tensor x) -> Tensor", _linear_wgrad, _fake_wgrad)
autograd("linear", _backward, _setup)
once_differentiable("linear_dgrad")
once_differentiable("linear_wgrad")
