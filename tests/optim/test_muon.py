"""Muon against a plain float64 version that knows every matrix by name."""

import math

import pytest
import torch

from tests.engine.test_train_step import ALONE, batch
from xtuner.config import LossConfig, OptimConfig
from xtuner.engine.train_step import train_step
from xtuner.models import SIZES, build_model
from xtuner.optim import build_optimizer
from xtuner.optim.muon import newton_schulz

CFG = OptimConfig(kind="muon", lr=0.01, weight_decay=0.1, momentum=0.9)


def make(name):
    model = build_model(SIZES[name])
    model.init_weights(seed=0)
    return model


def test_singular_values_end_near_one():
    generator = torch.Generator().manual_seed(0)
    for shape in ((40, 24), (24, 40), (32, 32), (1, 7)):
        x = torch.randn(3, *shape, generator=generator)
        values = torch.linalg.svdvals(newton_schulz(x))
        assert 0.6 < values.min() and values.max() < 1.3, (shape, values)
        u, _, vt = torch.linalg.svd(x, full_matrices=False)
        cosine = torch.nn.functional.cosine_similarity(newton_schulz(x).flatten(1), (u @ vt).flatten(1))
        assert cosine.min() > 0.97, shape
    assert not newton_schulz(torch.zeros(1, 4, 5)).any()


def reference_step(weight, gradient, momentum, rows):
    """One Muon step in float64 on each `rows`-row matrix of `weight`; returns the new weight."""
    momentum.mul_(CFG.momentum).add_(gradient * (1 - CFG.momentum))
    nesterov = (1 - CFG.momentum) * gradient + CFG.momentum * momentum
    new = []
    for w, m in zip(weight.split(rows), nesterov.split(rows), strict=True):
        x = m / m.norm().clamp_min(1e-7)
        x = x.T if m.shape[0] > m.shape[1] else x
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        x = x.T if m.shape[0] > m.shape[1] else x
        new.append(w * (1 - CFG.lr * CFG.weight_decay) - CFG.lr * 0.2 * math.sqrt(max(m.shape)) * x)
    return torch.cat(new)


@pytest.mark.parametrize("name", ["qwen3-moe-tiny", "llama-tiny"])
def test_every_expert_and_every_fused_projection_is_a_matrix_of_its_own(name):
    model = make(name)
    cfg = model.cfg
    rows = {"moe.w13": 64, "moe.w2": cfg.hidden_size, "mlp.w13": cfg.intermediate_size}
    optimizer = build_optimizer(model, CFG)
    generator = torch.Generator().manual_seed(1)
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    momenta = {n: torch.zeros_like(w) for n, w in weights.items()}
    others = {n: p.detach().clone() for n, p in model.named_parameters() if "layers" not in n or p.ndim == 1}
    adamw = [torch.nn.Parameter(p) for p in others.values()]
    rival = torch.optim.AdamW(
        [
            {"params": [p for p in adamw if p.ndim == 2]},
            {"params": [p for p in adamw if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=CFG.lr, betas=CFG.betas, eps=CFG.eps, weight_decay=CFG.weight_decay,
    )
    for _ in range(3):
        for parameter_name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            if parameter_name in others:
                adamw[list(others).index(parameter_name)].grad = p.grad.clone()
            else:
                height = rows.get(parameter_name.split(".", 2)[2], p.shape[0])
                weights[parameter_name] = reference_step(
                    weights[parameter_name], p.grad.double(), momenta[parameter_name], height
                )
        optimizer.step()
        rival.step()
    for parameter_name, p in model.named_parameters():
        if parameter_name in others:
            expected = adamw[list(others).index(parameter_name)]
        else:
            expected = weights[parameter_name].float()
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5, msg=parameter_name)


def test_it_learns():
    model = make("qwen3-moe-tiny")
    optimizer = build_optimizer(model, CFG)
    results = [train_step(model, optimizer, [batch(64)], LossConfig(), 1.0, ALONE) for _ in range(12)]
    assert results[-1].loss < results[0].loss - 1


def test_a_matrix_without_gradient_only_decays():
    model = make("llama-tiny")
    optimizer = build_optimizer(model, CFG)
    before = model.layers[0].attn.wq.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.layers[0].attn.wq.weight.detach(), before * (1 - 0.01 * 0.1))
