"""How a batch is cut: into slices for sequence parallelism, into halves for layers that overlap."""

import dataclasses

import pytest
import torch

from xtuner.batch import Batch, slice_sizes


def batch(*lengths):
    total = sum(lengths)
    tokens = torch.arange(total)
    return Batch(
        input_ids=tokens,
        labels=tokens + 100,
        loss_weights=tokens.float(),
        positions=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        max_seqlen=max(lengths),
        extras={"advantages": torch.randn(total, 2)},
        routing=torch.randint(8, (total, 3, 2), dtype=torch.int32),
    )


def per_token(b):
    return b.input_ids, b.labels, b.loss_weights, b.positions.T, b.extras["advantages"], b.routing


@pytest.mark.parametrize("lengths", [(5, 8), (1,), (3, 1, 2, 7, 1)])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_slices_are_the_whole_and_know_of_it(lengths, parts):
    whole = batch(*lengths)
    slices = [whole.slice(i, parts) for i in range(parts)]
    for together, expected in zip(zip(*map(per_token, slices), strict=True), per_token(whole), strict=True):
        assert torch.equal(torch.cat(together), expected)
    assert [s.num_tokens for s in slices] == slice_sizes(whole.num_tokens, parts)
    assert all(s.total_tokens == whole.num_tokens and s.max_seqlen == max(lengths) for s in slices)
    assert all(torch.equal(s.cu_seqlens, whole.cu_seqlens) for s in slices)


def test_sizes_differ_by_one_at_most():
    assert slice_sizes(10, 4) == [3, 3, 2, 2] and slice_sizes(2, 4) == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("lengths", "documents", "tokens", "longest"),
    [((4, 4), 1, 4, (4, 4)), ((1, 2, 9), 2, 3, (2, 9)), ((6, 1, 1, 2), 1, 6, (6, 2)), ((9, 1), 1, 9, (9, 1))],
)
def test_halves_are_cut_between_documents_near_the_middle(lengths, documents, tokens, longest):
    cut = batch(*lengths).halve().cut
    assert (cut.documents, cut.tokens, cut.max_seqlens) == (documents, tokens, longest)
    assert cut.total_tokens == (tokens, sum(lengths) - tokens)


def test_a_single_document_leaves_one_half_empty():
    cut = batch(7).halve().cut
    assert sorted(cut.total_tokens) == [0, 7] and sorted(cut.max_seqlens) == [0, 7]


def test_slices_of_halves():
    whole = batch(5, 3, 6).halve()
    slices = [whole.slice(i, 3) for i in range(3)]
    firsts = [s.input_ids[: s.cut.tokens] for s in slices]
    seconds = [s.input_ids[s.cut.tokens :] for s in slices]
    assert torch.equal(torch.cat(firsts + seconds), whole.input_ids)
    assert all(s.cut == dataclasses.replace(whole.cut, tokens=s.cut.tokens) for s in slices)
