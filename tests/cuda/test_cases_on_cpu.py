"""The cases that GPUs are tested with, on the CPU: they are right, and no op is forgotten."""

import pytest
import torch

from tests.cuda.cases import CASES, COLLECTIVE, KERNELS, SHAPES, check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_oracle(case, shape, dtype):
    inputs = case.inputs(shape, dtype, torch.Generator().manual_seed(0))
    check(case, case.call(*inputs), inputs, dtype)


def test_every_kernel_has_a_case():
    assert len(KERNELS) >= 14
    assert KERNELS - COLLECTIVE - {case.op for case in CASES} == set()
