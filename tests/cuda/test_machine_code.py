"""What nvcc made of the CUDA kernels: read from the objects that `make cuda` compiled. No GPU is needed."""

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.nvcc

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build/cuda/CMakeFiles/xt_cuda.dir/csrc/cuda"
TOOLS = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin"  # of nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm
ARCHITECTURES = ("sm_80", "sm_90a")
SOURCES = sorted(f.stem for f in (ROOT / "csrc/cuda").glob("*.cu"))

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


def cuobjdump(source: str, *arguments: str) -> str:
    tool = TOOLS / "cuobjdump"
    assert tool.exists(), f"{tool} is missing: pip install -r requirements/cuda.txt"
    command = [tool, *arguments, OBJECTS / f"{source}.cu.o"]
    path = f"{TOOLS}:{Path(shutil.which('sh')).parent}"  # cuobjdump starts nvdisasm
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env={"PATH": path}).stdout


def functions(source: str, architecture: str) -> dict[str, list[str]]:
    """Mangled name -> opcodes of the kernels of one source file."""
    text = cuobjdump(source, "-sass", "-arch", architecture)
    found = {}
    for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", text, re.DOTALL):
        found[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", body)
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
        limit = 64 if "scan_kernel" in name else 80  # 1024 threads a block, or 3 blocks of 256 on each multiprocessor
        assert int(registers) <= limit, name
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
