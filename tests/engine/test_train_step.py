"""One optimizer step, without any launcher."""

import math

import pytest
import torch

from xtuner.batch import Batch
from xtuner.config import LossConfig, OptimConfig
from xtuner.engine.nonfinite import find_nonfinite
from xtuner.engine.train_step import train_step
from xtuner.models import SIZES, build_model
from xtuner.optim import build_adamw
from xtuner.parallel import World

ALONE = World(rank=0, local_rank=0, size=1, local_size=1, device=torch.device("cpu"))


def make(name="qwen3-moe-tiny"):
    model = build_model(SIZES[name])
    model.init_weights(seed=0)
    return model, build_adamw(model, OptimConfig(lr=1e-2))


def batch(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return Batch(
        input_ids=torch.randint(0, 512, (total,), generator=generator),
        labels=torch.randint(0, 512, (total,), generator=generator),
        loss_weights=torch.rand(total, generator=generator),
        positions=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        max_seqlen=max(lengths),
    )


def step(model, optimizer, *batches, loss=None, max_grad_norm=1e9):
    return train_step(model, optimizer, batches, loss or LossConfig(), max_grad_norm, ALONE)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_loss_is_the_mean_over_loss_weights_and_falls():
    model, optimizer = make()
    b = batch(20, 12)
    with torch.no_grad():
        logits = model(b.input_ids, b.positions, b.cu_seqlens, b.max_seqlen).logits
    per_token = torch.nn.functional.cross_entropy(logits, b.labels, reduction="none")
    expected = (per_token * b.loss_weights).sum() / b.loss_weights.sum()
    results = [step(model, optimizer, b) for _ in range(5)]
    assert results[0].loss == pytest.approx(expected.item(), rel=1e-6)
    assert results[0].num_tokens == 32 and results[0].load_imbalance >= 1
    assert 0 < results[0].router_entropy <= math.log(8)
    assert results[-1].loss < results[0].loss


def test_a_gradient_that_is_not_finite_skips_the_step():
    model, optimizer = make()
    before, bad = weights(model), batch(16)
    bad.loss_weights[3] = math.inf
    result = step(model, optimizer, bad)
    assert result.skipped and not math.isfinite(result.grad_norm)
    after = weights(model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    good = step(model, optimizer, batch(16, seed=1))
    assert not good.skipped and math.isfinite(good.loss)
    assert any(not torch.equal(before[n], p) for n, p in weights(model).items())


def test_clipping_bounds_the_update_direction_not_the_reported_norm():
    model, optimizer = make()
    free = step(model, optimizer, batch(16))
    model, optimizer = make()
    assert step(model, optimizer, batch(16), max_grad_norm=1e-3).grad_norm == pytest.approx(free.grad_norm)


def test_dense_model_has_no_router_figures():
    model, optimizer = make("llama-tiny")
    result = step(model, optimizer, batch(16))
    assert result.load_imbalance is None and result.router_entropy is None and result.aux_loss == 0


def test_a_batch_without_anything_to_learn_changes_nothing_but_decay():
    model, optimizer = make("llama-tiny")
    b = batch(16)
    b.loss_weights.zero_()
    result = step(model, optimizer, b)
    assert result.loss == 0 and result.grad_norm == 0 and not result.skipped


def test_coefficients_reach_the_router():
    """With cross-entropy switched off, what moves the router are the auxiliary losses, each alone."""
    for loss in (LossConfig(aux_loss_coef=1.0), LossConfig(aux_loss_coef=0.0, z_loss_coef=1.0)):
        model, optimizer = make()
        b = batch(16)
        b.loss_weights.zero_()
        assert step(model, optimizer, b, loss=loss).grad_norm > 0


def test_the_first_bad_module_and_parameter_are_named():
    model, optimizer = make()
    assert find_nonfinite(model, [batch(16)], LossConfig(), ALONE) == "nothing bad when the step was repeated"
    with torch.no_grad():
        model.layers[1].moe.w2[3, 5] = math.inf
    text = find_nonfinite(model, [batch(16), batch(64)], LossConfig(), ALONE)
    assert text.startswith("bad weight of layers.1.moe.w2; first bad output of layers.1.moe; ")
    assert "bad gradient of parameter embed.weight, " in text
    assert all(p.grad is None for p in model.parameters())
