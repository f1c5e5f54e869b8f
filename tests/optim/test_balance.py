"""Balancing by a bias on the choice: the rule itself, and that it does balance."""

import pytest
import torch

from tests.engine.test_train_step import ALONE, batch
from xtuner.config import LossConfig, OptimConfig
from xtuner.engine.train_step import load_imbalance, train_step
from xtuner.models import SIZES, build_model
from xtuner.optim import build_adamw, update_choice_bias

TINY = SIZES["qwen3-moe-tiny"]


def make(choice_bias=True):
    moe = TINY.moe.model_copy(update={"choice_bias": choice_bias})
    model = build_model(TINY.model_copy(update={"moe": moe}))
    model.init_weights(seed=0)
    return model


def biases(model):
    return torch.stack([layer.moe.gate.choice_bias for layer in model.layers])


def test_the_bias_follows_the_sign_of_the_load_error():
    model = make()
    counts = torch.tensor([[4, 0, 2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 8]], dtype=torch.float64)
    update_choice_bias(model, counts, 0.5)
    expected = [[-0.5, 0.5, 0, 0, 0, 0, 0, 0], [0.5] * 7 + [-0.5]]
    assert biases(model).tolist() == expected
    update_choice_bias(model, counts.flip(0), 0.5)
    assert biases(model)[0].tolist() == [0, 1, 0.5, 0.5, 0.5, 0.5, 0.5, -0.5]


def test_a_model_without_the_bias_is_refused():
    with pytest.raises(ValueError, match="counts_LE has 2 rows, the model 0 routers"):
        update_choice_bias(make(choice_bias=False), torch.ones(2, 8), 0.5)


def test_weights_and_gradients_do_not_see_the_bias():
    model = make()
    router = model.layers[0].moe.gate
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    router.choice_bias.copy_(torch.tensor([9.0, 8, 0, 0, 0, 0, 0, 0]))
    weights, idx, _ = router(x)
    assert idx.tolist() == [[0, 1]] * 40
    probs = (x @ router.weight.T).softmax(-1)[:, :2]
    torch.testing.assert_close(weights, probs / probs.sum(-1, keepdim=True))


def test_it_balances_where_nothing_else_does_and_skipped_steps_leave_it_alone():
    """Routers with a strong preference; learning rate 0, so that only the bias moves."""
    model = make()
    for layer in model.layers:
        layer.mlp_norm.weight.data[0] = 20.0
        layer.moe.gate.weight.data[:, 0] *= torch.linspace(0, 3, 8)
    optimizer = build_adamw(model, OptimConfig(lr=1e-30, weight_decay=0))
    loss = LossConfig(aux_loss="none", bias_update_rate=0.01)
    seen = [train_step(model, optimizer, [batch(64, seed=i)], loss, 1.0, ALONE) for i in range(60)]
    first, last = (load_imbalance(sum(r.expert_counts for r in part)).max() for part in (seen[:5], seen[-5:]))
    assert first > 2 and last < 1.5, (first, last)
    before, bad = biases(model).clone(), batch(16)
    bad.loss_weights[0] = float("nan")
    assert train_step(model, optimizer, [bad], loss, 1.0, ALONE).skipped
    assert torch.equal(biases(model), before)
