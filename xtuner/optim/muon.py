"""Muon: momentum whose update is made orthogonal, matrix by matrix; AdamW for what is no matrix of the hidden layers.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the decay and the step size of Liu et al. 2025
(Moonlight, arXiv 2502.16982, eq. 4): the update's root mean square is 0.2, like AdamW's, so both share a learning rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from xtuner.config import OptimConfig
from xtuner.optim.matrices import MatrixExchange

NEWTON_SCHULZ_STEPS = 5
# Of the quintic a x + b x^3 + c x^5 that takes every singular value in (0, 1] near 1 in five steps (Jordan et al.).
QUINTIC = (3.4445, -4.7750, 2.0315)
# Elements of the parameters whose matrices are gathered at a time: bounds the memory.
BUCKET_ELEMENTS = 1 << 26


def build_muon(model: nn.Module, cfg: OptimConfig) -> Muon:
    """Muon for the matrices inside `model.layers`, AdamW for embedding, head, norms and biases. Collective.

    A module that stacks matrices in one parameter (experts; gate and up) says so in `stacked`: name -> how many.
    """
    stacked = {}
    for layer in model.layers:
        for module in layer.modules():
            for name, param in module.named_parameters(recurse=False):
                if param.ndim == 2 and param.requires_grad:
                    stacked[param] = getattr(module, "stacked", {}).get(name, 1)
    groups: dict[tuple[bool, bool, DeviceMesh | None], list[nn.Parameter]] = defaultdict(list)
    for param in model.parameters():
        if param.requires_grad:
            groups[param in stacked, param.ndim >= 2, getattr(param, "device_mesh", None)].append(param)
    return Muon(
        [
            {"params": params, "muon": is_muon, "weight_decay": cfg.weight_decay if is_matrix else 0.0}
            for (is_muon, is_matrix, _), params in groups.items()
        ],
        stacked,
        cfg,
    )


class Muon(torch.optim.Optimizer):
    """See the module. `step` is collective.

    Args:
        groups: each with "params", "muon" (else AdamW) and "weight_decay".
        stacked: how many matrices each parameter of a Muon group stacks along dim 0.
    """

    def __init__(self, groups: list[dict], stacked: dict[nn.Parameter, int], cfg: OptimConfig):
        super().__init__(groups, {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "muon": True})
        self.momentum, self.betas, self.eps = cfg.momentum, cfg.betas, cfg.eps
        load = [0.0] * (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
        self._buckets = [
            (bucket, MatrixExchange(bucket, [stacked[p] for p in bucket], load)) for bucket in _buckets(list(stacked))
        ]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        settings = {}
        for group in self.param_groups:
            if group["muon"]:
                settings |= {p: group for p in group["params"]}
            else:
                self._step_adamw(group)
        for params, exchange in self._buckets:
            updates = exchange.map([self._momentum(p) for p in params], orthogonalize)
            for param, update in zip(params, updates, strict=True):
                local, group = _local(param), settings[param]
                local.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _momentum(self, param: nn.Parameter) -> Tensor:
        """Nesterov momentum of this rank's rows. A parameter without gradient has a gradient of zero."""
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        average = _local(state["momentum"])
        gradient = torch.zeros_like(average) if param.grad is None else _local(param.grad)
        average.lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(average, self.momentum)

    def _step_adamw(self, group: dict) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), device=param.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        states = [self.state[p] for p in params]
        adamw(
            [_local(p) for p in params],
            [_local(p.grad) for p in params],
            [_local(s["exp_avg"]) for s in states],
            [_local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
            maximize=False,
        )


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """0.2 sqrt(max(rows, columns)) times the orthogonal factor of each matrix, nearly; matrices of a shape go together.

    On GPUs in bfloat16, as the coefficients are made for; on CPUs in float32, where that is no slower.
    """
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(index)
    for shape, indices in by_shape.items():
        batch = newton_schulz(torch.stack([matrices[i] for i in indices]))
        for index, result in zip(indices, batch * (0.2 * math.sqrt(max(shape))), strict=True):
            results[index] = result
    return results


def newton_schulz(x_BMN: Tensor) -> Tensor:
    """Every matrix with its singular values moved near 1; zero stays zero."""
    a, b, c = QUINTIC
    y = x_BMN.to(product_dtype(x_BMN.device))
    tall = y.shape[1] > y.shape[2]
    if tall:
        y = y.mT
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return (y.mT if tall else y).to(x_BMN.dtype)


def product_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _buckets(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = [[]]
    size = 0
    for param in params:
        if buckets[-1] and size + param.numel() > BUCKET_ELEMENTS:
            buckets.append([])
            size = 0
        buckets[-1].append(param)
        size += param.numel()
    return [bucket for bucket in buckets if bucket]


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value
