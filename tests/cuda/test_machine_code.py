"""What nvcc made of the CUDA kernels: read from the objects that `make cuda` compiled. No GPU is needed."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.nvcc

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build/cuda/CMakeFiles"
TOOLS = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"  # of nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm
ARCHITECTURES = ("sm_80", "sm_90a")
SOURCES = sorted(f.stem for f in (ROOT / "csrc/cuda").glob("*.cu") if "__global__" in f.read_text())

# Kernel name in the machine code: 16-byte loads and stores that the loop over a row must have, all loads before the
# first store (zeroing of rows apart). Names are mangled: I5uint4E is the access itself, ItLi8EE is bfloat16 by 8,
# IfLi4EE is float by 4.
WIDE = {
    ("permute", "permute_kernelI5uint4E"): (4, 4),
    ("unpermute", "unpermute_kernelItLi8EE"): (8, 2),
    ("unpermute", "unpermute_kernelIfLi4EE"): (8, 2),
    ("unpermute", "unpermute_bwd_kernelItLi8EE"): (8, 4),
    ("unpermute", "unpermute_bwd_kernelIfLi4EE"): (8, 4),
    ("swiglu", "swiglu_kernelItLi8EE"): (4, 2),
    ("swiglu", "swiglu_kernelIfLi4EE"): (4, 2),
    ("swiglu", "swiglu_bwd_kernelItLi8EE"): (6, 4),
    ("swiglu", "swiglu_bwd_kernelIfLi4EE"): (6, 4),
}


# Kernel: accesses that move a tile of it, by width in bits; all loads before the first store.
QUANTIZE = {
    ("quantize", "quantize_rows_kernelIt"): ({128: 4}, {64: 4}),
    ("quantize", "quantize_rows_kernelIf"): ({128: 4}, {}),
    ("quantize", "dequantize_kernelIt"): ({64: 4}, {128: 4}),
    ("quantize", "dequantize_kernelIf"): ({}, {128: 4}),
    ("quantize_tiles", "quantize_square_kernelIt"): ({128: 8}, {64: 8, 128: 4}),
    ("quantize_tiles", "quantize_square_kernelIf"): ({128: 8}, {128: 4}),
    ("quantize_tiles", "PlainRowsIt"): ({128: 8}, {64: 8, 128: 4}),
    ("quantize_tiles", "PlainRowsIf"): ({128: 8}, {128: 4}),
    ("quantize_tiles", "GatheredRowsIt"): ({128: 8}, {64: 8, 128: 4}),
    ("quantize_tiles", "GatheredRowsIf"): ({128: 8}, {128: 4}),
    ("quantize_tiles", "ActivatedRowsIt"): ({128: 16}, {64: 8, 128: 4}),
    ("quantize_tiles", "ActivatedRowsIf"): ({128: 16}, {128: 4}),
}


def register_limit(kernel: str) -> int:
    """Of 65536 for the threads that a multiprocessor should hold."""
    if "scan_kernel" in kernel:
        return 64  # 1024 threads a block
    if "quantize_rowcol" in kernel:
        return 128  # 512 threads, whose tiles are 64 KiB of loads
    if "simple_" in kernel:
        return 128  # 2 blocks of 256, whose sums are in registers
    return 80  # 3 blocks of 256


def cuobjdump(source: str, *arguments: str) -> str:
    tool = TOOLS / "cuobjdump"
    assert tool.exists(), f"{tool} is missing: pip install -r requirements/cuda.txt"
    (compiled,) = OBJECTS.glob(f"xt_cuda*.dir/csrc/cuda/{source}.cu.o")
    command = [tool, *arguments, compiled]
    path = f"{TOOLS}:{Path(shutil.which('sh')).parent}"  # cuobjdump starts nvdisasm
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env={"PATH": path}).stdout


def functions(source: str, architecture: str) -> dict[str, list[str]]:
    """Mangled name -> opcodes of the kernels of one source file."""
    text = cuobjdump(source, "-sass", "-arch", architecture)
    found = {}
    for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", text, re.DOTALL):
        found[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.x]*)", body)
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_code_for_every_gpu(source):
    cubins, ptx = cuobjdump(source, "-lelf"), cuobjdump(source, "-lptx")
    assert all(f".{architecture}.cubin" in cubins for architecture in ARCHITECTURES)
    assert "sm_90.ptx" in ptx


@pytest.mark.parametrize("source", SOURCES)
def test_registers_suffice(source):
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usage = re.findall(pattern, cuobjdump(source, "-res-usage"))
    assert len(usage) >= 2 * len(ARCHITECTURES)
    for name, registers, stack, shared, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= register_limit(name), name
        assert int(shared) <= 48 << 10, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_spilled(source, architecture):
    for name, opcodes in functions(source, architecture).items():
        assert len(opcodes) > 20, name
        assert not [o for o in opcodes if o.startswith(("LDL", "STL"))], name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("source", "kernel"), WIDE)
def test_rows_move_in_16_byte_accesses(source, kernel, architecture):
    loads, stores = WIDE[source, kernel]
    (opcodes,) = [body for name, body in functions(source, architecture).items() if kernel in name]
    wide = [o[:3] for o in opcodes if re.match(r"(LDG|STG)\.E\S*\.128", o)]
    assert wide.count("LDG") == loads, wide
    main = wide[wide.index("LDG") :]
    assert main[:loads] == ["LDG"] * loads, f"a store before the last load: {main}"
    assert main[loads:].count("STG") >= stores


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sort_uses_the_warp_instructions(architecture):
    for name, opcodes in functions("route_map", architecture).items():
        kinds = {o.split(".")[0] for o in opcodes}
        wanted = {"count": {"ATOMS", "BAR"}, "scan_": {"SHFL", "BAR"}, "write": {"MATCH", "ATOMS", "BAR"}}
        (kernel,) = [k for k in wanted if re.search(rf"\d{k}\w*kernel", name)]
        assert wanted[kernel] <= kinds, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("source", "kernel"), QUANTIZE)
def test_quantizers_move_tiles_in_wide_accesses(source, kernel, architecture):
    bodies = [body for name, body in functions(source, architecture).items() if kernel in name]
    assert len(bodies) == 2, "a kernel per format"
    for opcodes in bodies:
        for kind, wanted in zip(("LDG", "STG"), QUANTIZE[source, kernel], strict=True):
            for bits, count in wanted.items():
                found = [o for o in opcodes if re.match(rf"{kind}\.E\S*\.{bits}\b", o)]
                assert len(found) >= count, (kind, bits, found)
        wide = [o[:3] for o in opcodes if re.match(r"(LDG\.E\S*\.128|STG)", o)]
        loads = wide.count("LDG")
        first = wide.index("LDG") if loads else 0
        assert wide[first : first + loads] == ["LDG"] * loads, f"a store between the loads of a tile: {wide}"


@pytest.mark.parametrize(("format", "kernels"), [("E4M3", "6e4m3_t"), ("E5M2", "6e5m2_t")])
def test_hopper_converts_float8_in_hardware(format, kernels):
    bodies = {n: b for source in ("quantize", "quantize_tiles") for n, b in functions(source, "sm_90a").items()}
    found = {name: opcodes for name, opcodes in bodies.items() if kernels in name}
    assert len(found) == 12
    for name, opcodes in found.items():
        wanted = f"F2FP.F16.{format}.UNPACK_B" if "dequantize" in name else f"F2FP.SATFINITE.{format}.F32.PACK_AB"
        assert any(o.startswith(wanted) for o in opcodes), name
