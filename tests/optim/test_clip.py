import math

import torch

from xtuner.config import OptimConfig
from xtuner.optim import build_adamw, clip_grad_norm


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2))]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def test_agrees_with_torch():
    ours, theirs = parameters(), parameters()
    norm = clip_grad_norm(ours, 0.5, lambda t: t)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    assert math.isclose(norm, expected.item(), rel_tol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_small_gradients_stay():
    params = parameters()
    before = [p.grad.clone() for p in params]
    clip_grad_norm(params, 1e6, lambda t: t)
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))


def test_non_finite_norm_is_reported_and_touches_nothing():
    params = parameters()
    params[1].grad[0] = math.inf
    before = params[0].grad.clone()
    assert not math.isfinite(clip_grad_norm(params, 1.0, lambda t: t))
    assert torch.equal(params[0].grad, before)


def test_vectors_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.RMSNorm(4))
    optimizer = build_adamw(model, OptimConfig(weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay[id(model[0].weight)] == 0.3
    assert decay[id(model[0].bias)] == decay[id(model[1].weight)] == 0.0
