#!/bin/sh
# Builds the wheel in pip's isolated environment (which has no torch) and uses it from another directory.
# usage: wheel.sh PYTHON    PYTHON has torch and the runtime requirements
set -eu
python=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
start=$(date +%s)
"$python" -m pip wheel -q --no-deps -w "$work" .
echo "wheel built in $(($(date +%s) - start)) s: $(basename "$work"/*.whl)"
"$python" -m pip install -q --no-deps --target "$work/site" "$work"/*.whl
if ldd "$work"/site/xtuner/_C*.so | grep -E 'libcuda|libtorch|not found'; then
    echo "error: the core must load without these" >&2
    exit 1
fi
cd "$work"
PYTHONPATH="$work/site" "$python" -S -c "
import sys
sys.path += ['$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')']  # -S: no editable install
import torch, xtuner, xtuner._C
from xtuner import ops
assert xtuner.__file__.startswith('$work/site') and xtuner._C.__file__.startswith('$work/site'), xtuner._C.__file__
with_cuda = '$(command -v nvcc || true)' != ''
assert xtuner.build_info()['backends']['cuda'] == with_cuda, xtuner.build_info()
x = torch.randn(5, 8)
counts, offsets, row_of, src = ops.route_map(torch.tensor([[0], [2], [1], [2], [0]]), num_experts=3)
assert counts.tolist() == [2, 1, 2]
assert torch.equal(ops.unpermute(ops.permute(x, row_of, src), row_of, src), x)
# Without a GPU, or without kernels for it, nothing is asked of the driver until a tensor is there.
assert not torch.cuda.is_available() or with_cuda
y = ops.linear(torch.randn(4, 8), torch.randn(3, 8))
assert y.shape == (4, 3)
print('wheel works from', '$work', 'with CUDA kernels' if with_cuda else 'without CUDA kernels, as there is no nvcc')
"
