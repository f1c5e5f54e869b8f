"""The boundary between Python and the compiled core: how tensors cross, what is refused, threads and processes."""

import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch

import xtuner
from xtuner import _C, ops


def call_permute(x, row_of, src, out):
    _C.permute(x, row_of, src, out, 2)


def maps(*src):
    """One choice per token: row_of and its inverse."""
    row_of = [[src.index(t) if t in src else -1] for t in range(3)]
    return torch.tensor(row_of, dtype=torch.int32), torch.tensor(src, dtype=torch.int32)


def good_arguments():
    return torch.arange(12.0).view(3, 4), *maps(2, -1, 0), torch.empty(3, 4)


@pytest.fixture
def capsule_path():
    _C.init_exchange(torch.Tensor, False)
    yield
    _C.init_exchange(torch.Tensor)


def test_import_leaves_torch_alone():
    code = "import sys, xtuner; xtuner.build_info(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_build_info():
    info = xtuner.build_info()
    assert info["version"] == xtuner.__version__ == version("xtuner")
    assert info["backends"] == {"cpu": True, "cuda": info["backends"]["cuda"], "ascend": False}
    assert isinstance(info["backends"]["cuda"], bool)
    assert info["isa"] in info["isas"] and info["isas"][0] == "portable"
    assert info["compiler"]


def test_a_kernel_before_init_exchange_is_refused():
    code = "from xtuner import _C; _C.permute(1, 2, 3, 4, 1)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "Error: call _C.init_exchange(torch.Tensor) before any kernel" in result.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capsules_and_table_agree(capsule_path, dtype):
    x, row_of, src, out = good_arguments()
    x, out = x.to(dtype).requires_grad_(), out.to(dtype)
    call_permute(x, row_of, src, out)
    assert torch.equal(out, torch.stack([x[2], torch.zeros(4), x[0]]).to(dtype))
    with pytest.raises(_C.Error, match=r"permute: src must be int32 \[R\], got float32 \[3\] on cpu"):
        call_permute(x, row_of, torch.zeros(3), out)


def test_views_with_an_offset_cross():
    x = torch.arange(24.0).view(6, 4)[2:5]
    out = torch.full((5, 4), -1.0)
    call_permute(x, *maps(2, -1, 0), out[1:4])
    assert out.tolist() == [[-1] * 4, x[2].tolist(), [0] * 4, x[0].tolist(), [-1] * 4]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, [1.0], r"permute: x must be a torch.Tensor, got list"),
        (0, torch.zeros(4, 3).t(), r"permute: x must be contiguous, got float32 \[3, 4\] on cpu, strides \(1, 3\)"),
        (0, torch.zeros(3, 4, dtype=torch.float16), r"x must be float32 or bfloat16 \[T, H\], got unsupported dtype"),
        (0, torch.zeros(1, 1, 1, 3, 4), r"permute: x must have at most 4 dims, got 5"),
        (1, torch.zeros(2, 1, dtype=torch.int32), r"row_of must be int32 \[T=3, K\], got int32 \[2, 1\] on cpu"),
        (2, torch.zeros(3, dtype=torch.int64), r"permute: src must be int32 \[R\], got int64 \[3\] on cpu"),
        (2, torch.tensor([2, 3, 0], dtype=torch.int32), r"permute: src\[1\] must be in \[-1, T\*K=3\), got 3"),
        (3, torch.zeros(3, 5), r"permute: out must be float32 \[R=3, H=4\], got float32 \[3, 5\] on cpu"),
        (3, None, r"permute: out must be a torch.Tensor, got NoneType"),
    ],
)
def test_a_bad_argument_is_named(place, value, message):
    arguments = list(good_arguments())
    arguments[place] = value
    with pytest.raises(_C.Error, match=message):
        call_permute(*arguments)
    assert issubclass(_C.Error, ValueError)


def test_a_tensor_without_memory_is_refused():
    x, row_of, src, out = good_arguments()
    with pytest.raises(Exception, match="meta|memory"):
        call_permute(x.to("meta"), row_of, src, out)


def test_every_isa_gives_the_same_within_rounding():
    x, w = torch.randn(50, 40), torch.randn(2, 30, 40)
    offsets = torch.tensor([0, 20, 50])
    wanted = torch.cat([x[:20] @ w[0].t(), x[20:] @ w[1].t()])
    try:
        for isa in xtuner.build_info()["isas"]:
            _C.force_isa(isa)
            assert xtuner.build_info()["isa"] == isa
            torch.testing.assert_close(ops.gemm_m_grouped(x, w, offsets), wanted, rtol=1e-4, atol=1e-4)
    finally:
        _C.force_isa(None)
    with pytest.raises(_C.Error, match="force_isa: name must be one of portable"):
        _C.force_isa("abacus")


FAULTS = """
import resource, torch
from xtuner import _C
def faults_of_a_tensor(mebi):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mebi << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
if _C.keep_freed_memory():
    assert faults_of_a_tensor(32) >= 32, "nothing was measured"
    assert faults_of_a_tensor(16) < 100, "64 MiB were handed out anew"
"""


def test_freed_memory_is_kept():
    subprocess.run([sys.executable, "-c", FAULTS], check=True, timeout=60)


def product(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(300, 64, generator=generator), torch.randn(3, 48, 64, generator=generator)
    out = torch.empty(300, 48)
    _C.gemm_m_grouped(x, w, torch.tensor([0, 10, 200, 300]), True, out=out, num_threads=2)
    return out


def test_many_python_threads_at_once():
    wanted = [product(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for seed, got in zip([*range(4)] * 25, pool.map(product, [*range(4)] * 25), strict=True):
            assert torch.equal(got, wanted[seed])


def send_product(connection) -> None:
    connection.send(product(5).tolist())


def test_a_forked_child_can_use_the_core():
    wanted = product(5)  # the parent's thread pool exists before the fork
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=send_product, args=(sender,))
    child.start()
    assert receiver.poll(60), "the child hangs"
    assert receiver.recv() == wanted.tolist()
    child.join(10)
    assert child.exitcode == 0
