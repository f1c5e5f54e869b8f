"""A process group of one, and the parts of the world that need no second rank."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from xtuner.config import ParallelConfig
from xtuner.errors import ConfigError
from xtuner.models import SIZES, build_model
from xtuner.parallel import build_layout, init_world, parallelize


@pytest.fixture
def world():
    threads = torch.get_num_threads()
    yield init_world("cpu", num_threads=1)
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def build(cfg, world, **fields):
    """On the meta device, laid out over the one rank, then filled."""
    parallel = ParallelConfig(**fields)
    model = parallelize(build_model(cfg, "meta"), build_layout(parallel, cfg, world), parallel, world)
    model.to_empty(device="cpu")
    model.init_weights(seed=3)
    return model


def test_alone(world):
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert torch.get_num_threads() == 1
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    total = world.all_reduce_sum(values)
    assert total.tolist() == [1.0, 2.0] and not total.requires_grad
    assert world.any(True) and not world.any(False)


def test_sharded_model_computes_in_bf16_and_keeps_float32_weights(world):
    model = build(SIZES["qwen3-moe-tiny"], world, compute_dtype="bfloat16")
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in model.parameters())
    ids = torch.arange(12)
    out = model(ids, ids[None], torch.tensor([0, 12], dtype=torch.int32), 12)
    assert out.logits.dtype == torch.bfloat16 and out.stats[0].prob_sum.dtype == torch.float32
    out.logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_fresh_weights_do_not_depend_on_sharding(world):
    cfg = SIZES["qwen3-moe-tiny"]
    plain = build_model(cfg)
    plain.init_weights(seed=3)
    sharded = build(cfg, world)
    for (name, a), b in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(a, b.full_tensor()), name
    assert plain.embed.weight.std().item() == pytest.approx(cfg.initializer_range, rel=0.05)


def test_cuda_is_refused_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match="device=cuda: torch sees no CUDA device; use device=cpu or device=auto"):
        init_world("cuda", None)
