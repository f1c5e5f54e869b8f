#!/bin/sh
# What a GPU can tell, in two calls of less than ten minutes each, from a machine with a C++ compiler, CMake, ninja, nvcc,
# and Python with torch, pybind11, pytest and numpy; nothing is downloaded.
#   bench/on_gpu.sh check     builds; every op on the GPU against its oracle, twice, in CUDA graphs; the C++ comparisons with
#                             the CPU, if GoogleTest is installed or at $GTest_ROOT; compute-sanitizer; a sweep of tiles
#   bench/on_gpu.sh bench     builds; rates, and ratios to rivals
# A JSON file of each goes to $OUT, or to bench/results. With `cpu` as second argument, whatever needs no GPU is done on
# small shapes, to try this script out, and nothing goes to bench/results.
set -eu
cd "$(dirname "$0")/.."
stage=${1:-}
device=${2:-cuda}
python=${PYTHON:-python3}
case "$stage $device" in
    "check cuda" | "bench cuda") build=build/gpu cuda=ON ;;
    "check cpu" | "bench cpu") build=build/gpu-tried cuda=OFF ;;
    *)
        echo "usage: bench/on_gpu.sh check|bench [cpu]" >&2
        exit 2
        ;;
esac
if [ "$device" = cuda ]; then
    out=${OUT:-bench/results}
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
    # Instructions of Hopper's own are in "90a" only.
    if [ "$capability" = 90 ]; then architectures=90a-real; else architectures=$capability-real; fi
    name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr 'A-Z ' 'a-z-')
else
    out=${OUT:-$build}
    architectures=
    name=cpu
fi

gtest=
if [ "$stage $device" = "check cuda" ]; then
    for prefix in "${GTest_ROOT:-/usr}" /usr /usr/local; do
        if [ -e "$prefix/include/gtest/gtest.h" ]; then gtest=$(cd "$prefix" && pwd); fi
        [ -z "$gtest" ] || break
    done
fi
if [ -n "$gtest" ]; then tests=ON targets="_C cuda_device_test"; else tests=OFF targets=_C; fi

mkdir -p "$build" "$out"
# shellcheck disable=SC2086  # a list of targets
if ! cmake -S . -B "$build" -G Ninja -DXT_PYTHON=ON -DXT_TESTS=$tests -DXT_CUDA=$cuda \
    -DCMAKE_BUILD_TYPE=Release ${gtest:+"-DGTest_ROOT=$gtest"} \
    ${architectures:+-DXT_CUDA_ARCHITECTURES=$architectures} -Dpybind11_DIR="$($python -m pybind11 --cmakedir)" \
    >"$build/log" 2>&1 || ! cmake --build "$build" --target $targets >>"$build/log" 2>&1; then
    tail -n 40 "$build/log" >&2
    exit 1
fi
rm -f xtuner/_C*.so
cp "$build"/_C*.so xtuner/

# While the tests run: the same core with tiles of one width, whatever the shape. Only Hopper's kernels have two.
widths=
if [ "$stage $device $architectures" = "check cuda 90a-real" ]; then
    widths="128 256"
    for width in $widths; do
        cmake -S . -B "$build-$width" -G Ninja -DXT_PYTHON=ON -DXT_TESTS=OFF -DXT_CUDA=ON -DCMAKE_BUILD_TYPE=Release \
            -DXT_CUDA_ARCHITECTURES=$architectures "-DCMAKE_CUDA_FLAGS=-DXT_BLOCK_N=$width" \
            -Dpybind11_DIR="$($python -m pybind11 --cmakedir)" && cmake --build "$build-$width" --target _C &&
            mkdir -p "$build-$width/tree" && cp -r xtuner "$build-$width/tree/" &&
            rm "$build-$width"/tree/xtuner/_C*.so && cp "$build-$width"/_C*.so "$build-$width/tree/xtuner/"
    done >"$build/sweep.log" 2>&1 &
    sweep=$!
fi
export PYTHONPATH=.
export OMP_WAIT_POLICY=PASSIVE

failed=
steps=
# step NAME COMMAND...: runs it, keeps its output, goes on if it fails.
step() {
    step_name=$1
    shift
    begin=$(date +%s)
    if "$@" >"$out/$name-$step_name.log" 2>&1; then result=passed; else result=failed failed=1; fi
    tail -n 3 "$out/$name-$step_name.log"
    echo "$step_name: $result, $(($(date +%s) - begin)) s"
    steps="$steps $step_name=$result"
}

pytest="$python -m pytest -q -p no:cacheprovider -m gpu tests/cuda/device --device $device"
if [ "$stage" = check ]; then
    # shellcheck disable=SC2086  # a command and its arguments
    step pytest $pytest
    if [ -n "$gtest" ]; then
        # Not those whose messages name the double's device or whose memory the test maps by itself.
        step gtest timeout 150 "$build/tests/cpp/cuda_device/cuda_device_test" --gtest_brief=1 \
            --gtest_filter='-*Refuses*:*PastTwoToThe31*'
    else
        steps="$steps gtest=missing"
    fi
    for tool in memcheck racecheck; do
        [ "$device" = cuda ] || continue
        if ! command -v compute-sanitizer >/dev/null; then
            steps="$steps $tool=missing"
            continue
        fi
        # Without torch's cache, every tensor is an allocation of its own, whose bounds are checked.
        # shellcheck disable=SC2086
        step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 200 compute-sanitizer --tool "$tool" \
            --error-exitcode 9 --launch-timeout 120 $pytest -k "test_oracle and tokens=37"
    done
    if [ -n "$widths" ]; then
        wait "$sweep" || tail -n 20 "$build/sweep.log" >&2
        step tiles $python bench/ops/bench_device.py --products --budget 0.5 --json "$out/$name-tiles.json"
        for width in $widths; do
            step "tiles-$width" env "PYTHONPATH=$build-$width/tree" $python bench/ops/bench_device.py --products \
                --budget 0.5 --json "$out/$name-tiles-$width.json"
        done
    fi
    # shellcheck disable=SC2086
    $python bench/ops/device_steps.py --device "$device" --json "$out/$name-check.json" $steps
else
    step bench $python bench/ops/bench_device.py --device "$device" --json "$out/$name-bench.json"
    cat "$out/$name-bench.log"
fi
[ -z "$failed" ]
