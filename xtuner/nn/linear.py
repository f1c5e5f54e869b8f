"""The dense projection."""

from __future__ import annotations

from torch import Tensor, nn

from xtuner import ops


class Linear(nn.Linear):
    """torch's module over `ops.linear`, which knows where torch's own product is slow; or in float8."""

    fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8:
            out = ops.linear_fp8(x, self.weight)
            return out if self.bias is None else out + self.bias
        return ops.linear(x, self.weight, self.bias)


def linear_qkv(x: Tensor, wq: Linear, wk: Linear, wv: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Three projections of one input, in one operator where nothing needs them apart."""
    if any(w.fp8 or w.bias is not None for w in (wq, wk, wv)):
        return wq(x), wk(x), wv(x)
    return ops.linear_qkv(x, wq.weight, wk.weight, wv.weight)
