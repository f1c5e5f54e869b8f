"""The machine code of the tensor-core grouped products: the right instructions in the right order. No GPU is needed."""

import re

import pytest

from tests.cuda.test_machine_code import cuobjdump, functions

pytestmark = pytest.mark.nvcc

# Kernels of each: orientations of b (one for gradients) x rows gathered or not x widths of a tile; SwiGLU's backward.
HOPPER = {"sm90/gemm_m_grouped": 9, "sm90/gemm_k_grouped": 4}
AMPERE = "sm80/gemm"
# SwiGLU's backward: source, architecture, kernel, columns and rows of a warp.
DSWIGLU = [("sm90/gemm_m_grouped", "sm_90a", "m_kernelILb0ELb0ELb1E", 128, 16),
           (AMPERE, "sm_80", "m_kernelILb0ELb1EE", 64, 32)]  # fmt: skip
HOPPER_FP8 = {"sm90/gemm_m_grouped_fp8": 8, "sm90/gemm_k_grouped_fp8": 4}  # formats of both operands x widths
GATHERED = re.compile(r"m_kernelILb\dELb1E|k_kernelILb1E")


def kinds(opcodes: list[str]) -> set[str]:
    return {o.split(".")[0] for o in opcodes}


@pytest.mark.parametrize("source", HOPPER)
def test_hopper_multiplies_by_warpgroups(source):
    found = functions(source, "sm_90a")
    assert len(found) == HOPPER[source]
    for name, opcodes in found.items():
        products = [o for o in opcodes if o.startswith("HGMMA")]
        width = re.search(r"Li(128|256)E", name)[1]
        assert len(products) == 4, (name, products)  # the 64 k of a stage, in the one loop
        assert all(o.startswith(f"HGMMA.64x{width}x16.F32.BF16") for o in products), name


@pytest.mark.parametrize("source", HOPPER)
def test_hopper_products_of_a_stage_run_on_without_waiting(source):
    # What the compiler does if it takes the sums for used in between: a wait after each product.
    for name, opcodes in functions(source, "sm_90a").items():
        text = " ".join(o for o in opcodes if re.match("HGMMA|WARPGROUP|WARPSYNC.COLLECTIVE", o))
        assert re.search(r"ARRIVE (HGMMA\S+ ){4}WARPGROUP.DEPBAR", text), (name, text)
        assert text.count("DEPBAR") == 2, (name, text)  # within the loop and behind it


@pytest.mark.parametrize("source", HOPPER_FP8)
def test_hopper_multiplies_float8_blocks(source):
    found = functions(source, "sm_90a")
    assert len(found) == HOPPER_FP8[source]
    formats = []
    for name, opcodes in found.items():
        text = " ".join(o for o in opcodes if re.match(r"[QH]GMMA|WARPGROUP\.(ARRIVE|DEPBAR)", o))
        parts = 2 if "Li256E" in name else 1  # of 128 columns: all 128 k, then their sums are added to those before
        product = r"WARPGROUP\.ARRIVE (QGMMA\.64x128x32\.F32\.E\dM\d\.E\dM\d ){4}WARPGROUP\.DEPBAR\S*"
        assert re.fullmatch(" ".join([product] * parts), text), (name, text)
        assert {"UTMALDG", "SYNCS", "USETMAXREG"} <= kinds(opcodes), name
        assert opcodes.count("FFMA") >= 64 * parts, name
        assert [o for o in opcodes if re.match(r"STG\.E\S*\.128", o)], name
        (of_kernel,) = set(re.findall(r"E\dM\d\.E\dM\d", text))
        formats.append(of_kernel)
    each = HOPPER_FP8[source] // 4
    assert sorted(formats) == sorted(
        f"{a}.{b}" for a in ("E4M3", "E5M2") for b in ("E4M3", "E5M2") for _ in range(each)
    )


@pytest.mark.parametrize("source", HOPPER)
def test_hopper_loads_by_the_copy_engine_or_gathers(source):
    for name, opcodes in functions(source, "sm_90a").items():
        assert "UTMALDG" in kinds(opcodes), name
        assert ("LDGSTS" in kinds(opcodes)) == bool(GATHERED.search(name)), name
        assert {"SYNCS", "USETMAXREG"} <= kinds(opcodes), name
        assert [o for o in opcodes if re.match(r"STG\.E\S*\.128", o)], name


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_ampere_multiplies_by_warps(architecture):
    found = functions(AMPERE, architecture)
    assert len(found) == 4  # b along k, b along n, SwiGLU's backward, weight gradient
    for name, opcodes in found.items():
        assert opcodes.count("HMMA.16816.F32.BF16") == 32, name  # 32 x 64 x 32 per warp and stage
        copies = [o for o in opcodes if o.startswith("LDGSTS")]
        assert copies and all(o.startswith("LDGSTS.E.BYPASS.128") for o in copies), (name, copies)
        loads = {o for o in opcodes if o.startswith("LDSM")}
        assert loads <= {"LDSM.16.M88.4", "LDSM.16.MT88.4"} and loads, (name, loads)


@pytest.mark.parametrize(("source", "architecture", "kernel", "columns", "rows"), DSWIGLU)
def test_the_backward_of_swiglu_reads_rows_ahead(source, architecture, kernel, columns, rows):
    """Gate and up come in 16-byte units, all of 8 rows before the first of their results goes."""
    (opcodes,) = [body for name, body in functions(source, architecture).items() if kernel in name]
    wide = [o[:3] for o in opcodes if re.match(r"(LDG|STG)\.E\S*\.128", o)]
    units = columns // 32  # of a lane, in each of gate, up and act
    assert wide.count("LDG") == 2 * units * rows // 8
    first = wide.index("LDG")
    assert wide[first : first + 2 * units] == ["LDG"] * 2 * units, wide
    assert wide[first:].count("STG") >= 3 * units * rows // 8


@pytest.mark.parametrize("source", [*HOPPER, *HOPPER_FP8, AMPERE])
def test_products_fit_their_registers(source):
    """Registers of 65536: 384 threads of 168 on Hopper (which then pass some on), 256 threads on others."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    usage = re.findall(pattern, cuobjdump(source, "-res-usage"))
    assert usage
    for name, registers, stack, shared, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(shared) <= 1024, name  # the system's own; ours is asked for at launch
        assert int(registers) <= (255 if source == AMPERE else 168), name
    for architecture in ("sm_90a",) if source != AMPERE else ("sm_80", "sm_90a"):
        for name, opcodes in functions(source, architecture).items():
            assert not kinds(opcodes) & {"LDL", "STL"}, name


def test_hopper_code_is_built_for_nothing_else():
    for source in [*HOPPER, *HOPPER_FP8]:
        assert set(re.findall(r"sm_\w+?(?=\.cubin)", cuobjdump(source, "-lelf"))) == {"sm_90a"}
        assert ".ptx" not in cuobjdump(source, "-lptx")
