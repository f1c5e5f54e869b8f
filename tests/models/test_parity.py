"""Same logits, losses and gradients as transformers."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.hf_models import CASES, make_hf, make_ours, split_experts, stacked
from xtuner.models import hf_map
from xtuner.nn.loss import load_balancing_loss


def packed(*lengths, vocab=97, seed=1):
    """Token ids and the packing arguments of documents of these lengths."""
    ids = torch.randint(0, vocab, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ids, positions, cu_seqlens, max(lengths)


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize(("family", "shape"), CASES)
def test_logits_loss_and_gradients(family, shape):
    theirs = make_hf(family, shape)
    ours = make_ours(theirs)
    ids, *packing = packed(40)
    logits = theirs(ids[None]).logits[0]
    torch.testing.assert_close(ours(ids, *packing).logits, logits, rtol=0, atol=1e-4)

    labels = torch.roll(ids, -1)
    weights = torch.ones(40)
    weights[-1] = 0
    use_router = family == "qwen3_moe"
    extra = {"output_router_logits": True} if use_router else {}
    result = theirs(ids[None], labels=ids[None], **extra)
    output = ours(ids, *packing, labels=labels, loss_weights=weights)
    loss = output.loss_sum / weights.sum()
    if use_router:
        aux = load_balancing_loss(output.stats, torch.tensor(40.0), "hf", ours.cfg.moe.num_experts_per_tok)
        torch.testing.assert_close(aux, result.aux_loss, rtol=0, atol=1e-4)
        loss = loss + theirs.config.router_aux_loss_coef * aux
    torch.testing.assert_close(loss, result.loss, rtol=0, atol=1e-4)

    loss.backward()
    result.loss.backward()
    names = hf_map(ours.cfg)
    gradients = split_experts({n: p.grad for n, p in theirs.named_parameters()})
    for name, param in ours.named_parameters():
        expected = stacked(names, name, gradients)
        assert relative(param.grad, expected) <= 1e-4, (name, relative(param.grad, expected))


def test_an_expert_without_tokens_was_among_them():
    model = make_ours(make_hf("qwen3_moe", "64 experts, most idle"))
    ids, *packing = packed(40)
    stats = model(ids, *packing).stats
    assert all((s.counts == 0).any() and s.counts.sum() == 40 for s in stats)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama", "deepseek_v3"])
def test_packed_documents_equal_documents_one_by_one(family):
    model = make_ours(make_hf(family, {"qwen3_moe": "6 experts top-2", "deepseek_v3": "grouped"}.get(family, "gqa2")))
    lengths = (13, 1, 22, 4)
    ids, *packing = packed(*lengths)
    labels, weights = torch.roll(ids, -1), torch.rand(40, generator=torch.Generator().manual_seed(4))
    logits = model(ids, *packing).logits
    model(ids, *packing, labels=labels, loss_weights=weights).loss_sum.backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    start, parts = 0, []
    for n in lengths:
        rows = slice(start, start + n)
        one = (ids[rows], torch.arange(n)[None], torch.tensor([0, n], dtype=torch.int32), n)
        parts.append(model(*one).logits)
        model(*one, labels=labels[rows], loss_weights=weights[rows]).loss_sum.backward()
        start += n
    torch.testing.assert_close(logits, torch.cat(parts), rtol=0, atol=1e-5)
    for name, param in model.named_parameters():
        assert relative(param.grad, together[name]) <= 1e-5, name


def test_balance_loss_per_layer_is_one_when_balanced():
    from xtuner.nn.router import RouterStats

    tokens, experts, k = 24.0, 4, 2
    even = RouterStats(torch.full((4,), tokens * k / experts), torch.full((4,), tokens / experts), None, None, None)
    skewed = RouterStats(torch.tensor([tokens, tokens, 0, 0]), torch.tensor([tokens, 0.0, 0, 0]), None, None, None)
    total = torch.tensor(tokens)
    assert load_balancing_loss([even, even], total, "layer", k).item() == pytest.approx(1.0)
    assert load_balancing_loss([even, even], total, "hf", k).item() == pytest.approx(k)
    assert load_balancing_loss([skewed], total, "layer", k).item() == pytest.approx(2.0)
    with pytest.raises(ValueError, match="mode='global': must be 'layer' or 'hf'"):
        load_balancing_loss([even], total, "global", k)


def test_bf16_stays_close_to_transformers():
    theirs = make_hf("qwen3", "gqa2")  # dense: rounding cannot flip a routing decision
    ours = make_ours(theirs).bfloat16()
    ids, *packing = packed(40)
    expected = theirs(ids[None]).logits[0]
    bf16 = theirs.bfloat16()(ids[None]).logits[0].float()
    error, peer = (F.mse_loss(x, expected).sqrt() for x in (ours(ids, *packing).logits.float(), bf16))
    assert error <= 1.2 * peer, (error, peer)
