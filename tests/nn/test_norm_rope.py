"""RMSNorm and rotary embedding against their formulas, with gradients, and bit for bit against transformers in bf16."""

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from xtuner import ops
from xtuner.config import RopeConfig
from xtuner.nn.norm import RMSNorm
from xtuner.nn.rope import inverse_frequencies, rotary_tables


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(9, 32), (5, 3, 16), (0, 8)])
def test_norm_and_its_gradient(shape):
    norm = RMSNorm(shape[-1], eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(randn(shape[-1], seed=1))
    x, grad = randn(*shape, seed=2).requires_grad_(), randn(*shape, seed=3)
    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    expected.backward(grad.double())
    y = norm(x)
    y.backward(grad)
    for ours, theirs in [(y, expected), (x.grad, exact.grad), (norm.weight.grad, weight.grad)]:
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_norm_rounds_as_transformers_does():
    ours, theirs = RMSNorm(64, 1e-6).bfloat16(), LlamaRMSNorm(64, 1e-6).bfloat16()
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(randn(64, seed=1))
    x = randn(200, 64).bfloat16()
    different = (ours(x) != theirs(x)).float().mean()
    assert different < 0.001  # a sum taken in another order may tip a rounding now and then


def test_a_zero_row_has_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    RMSNorm(8, 1e-6)(x).sum().backward()
    assert x.grad.isfinite().all()


def tables(positions, cfg, head_dim, dtype=torch.float32):
    return rotary_tables(torch.tensor(positions), head_dim, cfg, dtype)


def test_rotation_and_its_gradient():
    cos, sin = tables([0, 3, 700], RopeConfig(theta=100.0), 16)
    x, grad = randn(3, 2, 16).requires_grad_(), randn(3, 2, 16, seed=1)
    # As transformers writes it: tables twice as wide, and one head axis before the tokens.
    wide = [torch.cat([t, t], -1)[None] for t in (cos, sin)]
    other = x.detach().clone().requires_grad_()
    expected, _ = apply_rotary_pos_emb(other.transpose(0, 1)[None], other.transpose(0, 1)[None], *wide)
    expected = expected[0].transpose(0, 1)
    y = ops.rotary(x, cos, sin)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-6, atol=1e-6)


def test_only_distances_matter():
    q, k = randn(1, 1, 32), randn(1, 1, 32, seed=1)

    def score(i, j):
        cfg = RopeConfig()
        return (ops.rotary(q, *tables([i], cfg, 32)) * ops.rotary(k, *tables([j], cfg, 32))).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), rtol=1e-4, atol=1e-4)
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3


def test_frequencies():
    default = inverse_frequencies(8, RopeConfig(theta=10_000.0), "cpu")
    torch.testing.assert_close(default, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    linear = inverse_frequencies(8, RopeConfig(theta=10_000.0, type="linear", factor=4.0), "cpu")
    torch.testing.assert_close(linear, default / 4)
    # Wavelengths 6, 63, 628, 6283 in a context of 700: kept, kept, blended, stretched.
    cfg = RopeConfig(theta=10_000.0, type="llama3", factor=8.0, original_max_position_embeddings=700)
    blend = (700 / (2 * math.pi / 0.01) - 1) / 3
    expected = torch.tensor([1.0, 0.1, 0.01 * blend + 0.01 / 8 * (1 - blend), 0.001 / 8])
    torch.testing.assert_close(inverse_frequencies(8, cfg, "cpu"), expected)
