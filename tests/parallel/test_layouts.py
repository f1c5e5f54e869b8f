"""A layout never changes the result: the same loss and the same gradient as on one rank."""

import numpy as np
import pytest
import torch

from tests.parallel import layout_rank
from tests.parallel.layout_rank import ALL_LOSSES, ARCH, CROSS_ENTROPY_ALONE, STARVED
from xtuner.checkpoint.hf import save_hf
from xtuner.config import ParallelConfig
from xtuner.data import collate
from xtuner.errors import ConfigError
from xtuner.models import config_to_hf, hf_map
from xtuner.parallel import check_layout

TOLERANCE = 1e-5
# Rounding moves probabilities by about 1e-7; a routing decision closer than this could flip.
SAFE_MARGIN = 1e-5

# name -> ranks, fields of ParallelConfig
LAYOUTS = {
    "1 rank": (1, {}),
    "FSDP 2": (2, {}),
    "FSDP 4": (4, {}),
    "HSDP 2x2": (4, {"shard_size": 2}),
    "EP 2, fused": (2, {"ep_size": 2, "dispatcher": "fused"}),
    "EP 2, all_to_all": (2, {"ep_size": 2, "dispatcher": "all_to_all"}),
    "EP 4, fused": (4, {"ep_size": 4, "dispatcher": "fused"}),
    "EP 4, all_to_all": (4, {"ep_size": 4, "dispatcher": "all_to_all"}),
    "EP 2 x FSDP 2, fused": (4, {"ep_size": 2, "dispatcher": "fused"}),
    "EP 2 x FSDP 2, all_to_all": (4, {"ep_size": 2, "dispatcher": "all_to_all"}),
    "EP 4, fused, rounds": (4, {"ep_size": 4, "dispatcher": "fused", "max_load": 0.3}),
    "EP 2, all_to_all, rounds": (2, {"ep_size": 2, "dispatcher": "all_to_all", "max_load": 0.3}),
    "EP 4, presum": (4, {"ep_size": 4, "combine": "presum"}),
    "EP 4, fused, static": (4, {"ep_size": 4, "dispatch_mode": "static", "capacity_factor": 16}),
    "HSDP 2 x EP 2": (4, {"shard_size": 2, "ep_size": 2}),
    "1 rank, halves": (1, {"intra_layer_micro_batches": 2}),
    "FSDP 4, halves": (4, {"intra_layer_micro_batches": 2}),
    "EP 2, fused, halves": (2, {"ep_size": 2, "dispatcher": "fused", "intra_layer_micro_batches": 2}),
    "EP 4, all_to_all, halves": (4, {"ep_size": 4, "dispatcher": "all_to_all", "intra_layer_micro_batches": 2}),
    "SP 4, halves": (4, {"sp_size": 4, "intra_layer_micro_batches": 2}),
    "SP 2 x EP 2, all_to_all, halves": (
        4, {"sp_size": 2, "ep_size": 2, "dispatcher": "all_to_all", "intra_layer_micro_batches": 2}
    ),
    "SP 2": (2, {"sp_size": 2}),
    "SP 4": (4, {"sp_size": 4}),
    "SP 2 x FSDP 2": (4, {"sp_size": 2}),
    "SP 2 x EP 2 on 2": (2, {"sp_size": 2, "ep_size": 2}),
    "SP 2 x EP 2": (4, {"sp_size": 2, "ep_size": 2}),
    "SP 2 x EP 4": (4, {"sp_size": 2, "ep_size": 4}),
    "SP 4 x EP 2 x HSDP 2": (4, {"sp_size": 4, "ep_size": 2, "shard_size": 2}),
}
QUICK = ("1 rank", "FSDP 2", "HSDP 2x2", "EP 4, all_to_all", "EP 2 x FSDP 2, fused", "SP 4", "SP 2 x EP 2",
         "SP 2 x EP 2, all_to_all, halves")  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    directory = tmp_path_factory.mktemp("layouts") / "hf"
    save_hf(layout_rank.make_model(), hf_map(ARCH), directory, config=config_to_hf(ARCH))
    return directory


@pytest.fixture(scope="module")
def expected():
    """Result and gradient of a plain model, by whether all losses are on."""
    return {loss is ALL_LOSSES: layout_rank.plain_step(loss) for loss in (ALL_LOSSES, CROSS_ENTROPY_ALONE)}


@pytest.fixture(scope="module")
def table():
    rows = []
    yield rows
    print(f"\n{'layout':32} {'micro-batches':>13} {'loss':>9} {'figures':>9} {'experts':>9} {'the rest':>9}")
    for name, micro, *differences in rows:
        print(f"{name:32} {micro:13d} " + " ".join(f"{d:9.1e}" for d in differences))


def test_the_data_is_skewed_and_no_decision_hangs_on_rounding():
    assert min(len(pack.ids) for pack in layout_rank.make_packs()) == 1, "no half is empty"
    margins, counts = [], []

    def look(router, inputs, outputs):
        probabilities = torch.softmax(inputs[0] @ router.weight.T, -1).sort(-1, descending=True).values
        margins.append((probabilities[:, 1] - probabilities[:, 2]).min().item())
        counts.append(outputs[2].counts)

    model, batch = layout_rank.make_model(), collate(layout_rank.make_packs())
    for layer in model.layers:
        if layer.is_moe:
            layer.moe.gate.register_forward_hook(look)
    model(batch.input_ids, batch.positions, batch.cu_seqlens, batch.max_seqlen)
    assert min(margins) > SAFE_MARGIN, margins
    for counts_E in counts:
        assert not counts_E[list(STARVED)].any() and counts_E.max() > 2 * counts_E.mean(), counts_E


def difference(value, wanted):
    """Norm of the difference over the norm of what is wanted, which may be 0."""
    return np.linalg.norm(value - wanted) / (np.linalg.norm(wanted) or 1.0)


def check(ranks, weights, expected, table, name, micro, memory=None):
    """All losses are on, except where micro-batches are more than one: then they are means of other sets of tokens."""
    num_ranks, fields = LAYOUTS[name]
    loss = ALL_LOSSES if micro == 1 else CROSS_ENTROPY_ALONE
    results = ranks.run(layout_rank.step_in_layout, num_ranks, fields, loss, micro, weights, memory)
    (figures, counts_LE, gradient), (wanted, wanted_LE, wanted_gradient) = results[0], expected[micro == 1]
    assert all(r[0] == figures for r in results), "ranks report different figures"
    assert figures["num_tokens"] == wanted["num_tokens"] and np.array_equal(counts_LE, wanted_LE)
    assert gradient.keys() == wanted_gradient.keys()
    worst = {True: 0.0, False: 0.0}
    for parameter, value in gradient.items():
        want, is_expert = wanted_gradient[parameter], "moe.w" in parameter
        assert value.shape == want.shape and np.linalg.norm(want) > 0, parameter
        if is_expert:
            for e in STARVED:
                assert not value.reshape(ARCH.moe.num_experts, -1)[e].any(), f"{parameter}: expert {e} got nothing"
        worst[is_expert] = max(worst[is_expert], difference(value, want))
    loss_difference, *others = (
        difference(figures[figure], wanted[figure])
        for figure in ("loss", "aux_loss", "z_loss", "grad_norm", "router_entropy")
    )
    row = name + (" + memory" if memory else "")
    table.append((row, micro, loss_difference, max(others), worst[True], worst[False]))
    assert max(table[-1][2:]) < TOLERANCE, table[-1]


@pytest.mark.parametrize("name", QUICK)
def test_same_loss_and_gradient(ranks, weights, expected, table, name):
    check(ranks, weights, expected, table, name, micro=1)


def test_gradient_accumulation(ranks, weights, expected, table):
    check(ranks, weights, expected, table, "EP 2, fused", micro=2)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_low_precision_reduction_errs_by_its_rounding(ranks, weights, num_ranks):
    """Each rank's part is rounded once and each sum once, by 2^-8 at most of what all parts add up to in absolute
    value."""
    exact, reduced = (
        ranks.run(layout_rank.reduced_gradients, num_ranks, weights, dtype) for dtype in ("float32", "bfloat16")
    )
    assert all(travelled == {torch.float32} for *_, travelled in exact)
    assert all(travelled == {torch.bfloat16} for *_, travelled in reduced)
    used = 0.0
    for name, value in reduced[0][0].items():
        parts = np.stack([own[name] for _, own, _ in exact]).astype(np.float64)
        np.testing.assert_allclose(exact[0][0][name], parts.sum(0), rtol=0, atol=1e-5 * np.abs(parts).sum(0).max())
        bound = num_ranks * 2.0**-8 * np.abs(parts).sum(0)
        error = np.abs(value - parts.sum(0))
        assert (error <= 1.02 * bound + 1e-7).all(), name
        used = max(used, (error / (bound + 1e-7)).max())
    assert used > 0.1  # it is the rounding that the bound is about


ALL_TECHNIQUES = {"checkpointing": "full", "offload_activations": True, "offload_parameters": True}
MIXED_TECHNIQUES = {"checkpointing": "selective", "checkpointing_ratio": 0.5}


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("FSDP 2", ALL_TECHNIQUES),
        ("EP 2, fused", ALL_TECHNIQUES),
        ("EP 2 x FSDP 2, all_to_all", ALL_TECHNIQUES),
        ("SP 2 x EP 2", ALL_TECHNIQUES),
        ("EP 2, fused", MIXED_TECHNIQUES),
        ("SP 2", MIXED_TECHNIQUES),
        ("SP 2 x EP 2, all_to_all, halves", ALL_TECHNIQUES),
        ("SP 2 x EP 2, all_to_all, halves", MIXED_TECHNIQUES),
    ],
)
def test_memory_techniques_change_nothing(ranks, weights, expected, table, name, memory):
    check(ranks, weights, expected, table, name, 1, memory)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "micro"),
    [(name, micro) for name, (num_ranks, fields) in LAYOUTS.items() for micro in (1, 2)
     if num_ranks // fields.get("sp_size", 1) * micro <= layout_rank.PACKS],
)  # fmt: skip
def test_whole_grid(ranks, weights, expected, table, name, micro):
    check(ranks, weights, expected, table, name, micro)


@pytest.mark.parametrize(
    ("num_ranks", "fields", "arch", "message"),
    [
        (8, {"ep_size": 8}, {"moe.num_experts": 63}, "moe.num_experts=63 is not divisible by parallel.ep_size=8"),
        (6, {"ep_size": 4}, {}, "ranks=6 is not divisible by parallel.ep_size=4"),
        (6, {"shard_size": 4}, {}, "ranks=6 is not divisible by parallel.shard_size=4"),
        (8, {"shard_size": 2, "ep_size": 4}, {}, "parallel.shard_size=2 is not divisible by parallel.ep_size=4"),
        (6, {"sp_size": 4}, {}, "ranks=6 is not divisible by parallel.sp_size=4"),
        (8, {"sp_size": 8}, {}, "num_attention_heads=4 is not divisible by parallel.sp_size=8"),
        (3, {"sp_size": 3}, {"num_attention_heads": 6}, "num_key_value_heads=2 and parallel.sp_size=3"),
        (10, {"ep_size": 2}, {}, r"4 x 2 x moe_intermediate_size = 96 rows.*among the 5 ranks"),
    ],
)  # fmt: skip
def test_degrees_that_do_not_fit_are_named(num_ranks, fields, arch, message):
    values = ARCH.model_dump(mode="json")
    for field, value in arch.items():
        section = values["moe"] if field.startswith("moe.") else values
        section[field.removeprefix("moe.")] = value
    with pytest.raises(ConfigError, match=message):
        check_layout(ParallelConfig(**fields), type(ARCH).parse(values), num_ranks)


def test_a_dense_model_has_no_experts_to_split():
    dense = ARCH.model_copy(update={"family": "qwen3", "moe": None, "dense_layers": ()})
    with pytest.raises(ConfigError, match="parallel.ep_size=2 needs a mixture of experts"):
        check_layout(ParallelConfig(ep_size=2), dense, 2)
