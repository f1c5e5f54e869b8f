"""Weights gathered in float8: the same bits wherever they are cut, and the same step."""

import numpy as np
import pytest
import torch

from tests.parallel import fp8_rank
from tests.parallel.fp8_rank import ARCH
from xtuner import ops
from xtuner.checkpoint.hf import save_hf
from xtuner.models import config_to_hf, hf_map

LAYOUTS = {
    "1 rank": (1, {}),
    "FSDP 2": (2, {}),
    "FSDP 4": (4, {}),
    "HSDP 2x2": (4, {"shard_size": 2}),
    "EP 2": (2, {"ep_size": 2}),
    "EP 2 x FSDP 2": (4, {"ep_size": 2}),
    "bfloat16": (2, {"compute_dtype": "bfloat16"}),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fp8") / "hf"
    save_hf(fp8_rank.make_model(), hf_map(ARCH), directory, config=config_to_hf(ARCH))
    return directory


@pytest.fixture(scope="module")
def one_rank(ranks, weights):
    return ranks.run(fp8_rank.step_and_codes, 1, {}, weights)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_gathered_codes_are_those_of_the_whole_weight(ranks, weights, one_rank, name):
    """Losses are equal but for rounding. Gradients of weights are quantized over 128 tokens of a rank, whichever."""
    num_ranks, fields = LAYOUTS[name]
    results = ranks.run(fp8_rank.step_and_codes, num_ranks, fields, weights)
    whole = dict(fp8_rank.make_model().layers.named_parameters())
    for rank, (_, _, codes) in enumerate(results):
        assert {n.split(".", 1)[1] for n in codes} >= {"attn.wq.weight", "moe.w13", "moe.w2", "mlp.w13", "mlp.w2"}
        for parameter_name, (q, scale) in codes.items():
            weight, ep_size = whole[parameter_name].detach(), fields.get("ep_size", 1)
            if "moe" in parameter_name:
                weight = weight.chunk(ep_size)[rank % ep_size]
            wanted, _, wanted_scale = ops.quantize_128x128(weight[None])
            assert np.array_equal(q, wanted[0].view(torch.uint8).numpy()), (parameter_name, rank)
            assert np.array_equal(scale, wanted_scale[0].numpy()), (parameter_name, rank)
    figures, gradient, _ = results[0]
    if "compute_dtype" in fields:  # some tokens choose otherwise
        assert figures["loss"] == pytest.approx(one_rank[0]["loss"], rel=1e-2)
        return
    for figure in ("loss", "aux_loss", "router_entropy"):
        assert figures[figure] == pytest.approx(one_rank[0][figure], rel=1e-5), figure
    for parameter_name, value in gradient.items():
        wanted = one_rank[1][parameter_name]
        assert np.linalg.norm(value - wanted) < 0.05 * np.linalg.norm(wanted), parameter_name
