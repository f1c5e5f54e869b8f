"""The arrows of the architecture: who may import whom, in Python and in C++. A broken arrow fails here by name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Left may import right, never the other way. Packages in one group do not import each other, but see EXTRA.
LAYERS = [
    {"run"},
    {"recipes", "rl", "engine", "plan"},
    {"checkpoint", "optim", "data", "models"},
    {"nn", "parallel"},
    {"ops"},
    {"_C"},
]
EXTRA = {("rl", "engine"), ("plan", "engine")}
FREE = {"config", "errors", "batch"}  # everybody may import these; they import only each other
LEVEL = {name: level for level, group in enumerate(LAYERS) for name in group}

# Folder of csrc -> folders whose headers it may include ("xtuner" is csrc/include/xtuner).
INCLUDES = {
    "include": {"xtuner"},
    "python": {"xtuner", "python"},
    "ops": {"xtuner", "ops", "cpu", "cuda", "ascend"},
    "cpu": {"xtuner", "cpu"},
    "cuda": {"xtuner", "cuda"},
    "ascend": {"xtuner", "ascend"},
}
TORCH_HEADER = re.compile(r"^(torch|ATen|c10|caffe2)/")
PYTHON_HEADER = re.compile(r"^(Python\.h|pybind11/|nanobind/)")


def package_of(module: str) -> str | None:
    """`xtuner.nn.moe` -> `nn`; None for `xtuner` itself and for foreign modules."""
    parts = module.split(".")
    return parts[1] if parts[0] == "xtuner" and len(parts) > 1 else None


def imported_modules(source: str, module: str) -> set[str]:
    """Absolute names of everything that `source`, the text of `module`, imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from xtuner import ops` names a package, `from xtuner.ops import permute` need not; both say enough.
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    return found


def broken_arrows(source: str, module: str) -> list[str]:
    me, problems = package_of(module), []
    for target in sorted(imported_modules(source, module)):
        other = package_of(target)
        if me == "nn" and (target == "torch.distributed" or target.startswith("torch.distributed.")):
            problems.append(f"{module} imports {target}: nn is single-device")
        if other is None or other == me or other in FREE or other not in LEVEL and other not in FREE:
            continue
        allowed = me in LEVEL and (LEVEL[me] < LEVEL[other] or (me, other) in EXTRA)
        if me is None and other == "_C":  # xtuner/__init__.py reports the build
            allowed = True
        if not allowed:
            problems.append(f"{module} imports {target}")
    return problems


def python_files() -> list[Path]:
    return sorted((ROOT / "xtuner").rglob("*.py"))


def module_name(file: Path) -> str:
    """Dotted name; a package's __init__ keeps that last part, so that relative imports resolve alike."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def test_every_package_has_a_layer():
    names = {package_of(module_name(f)) for f in python_files()} - {None, "__init__"}
    assert {"nn", "ops", "models", "engine"} <= names
    assert names <= LEVEL.keys() | FREE


@pytest.mark.parametrize("file", python_files(), ids=lambda f: str(f.relative_to(ROOT)))
def test_python_arrows(file):
    name = module_name(file)
    assert not broken_arrows(file.read_text(), "xtuner" if name == "xtuner.__init__" else name)


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("xtuner.nn.moe", "from xtuner.parallel import World", True),
        ("xtuner.nn.moe", "import torch.distributed as dist", True),
        ("xtuner.nn.moe", "from torch import distributed", True),
        ("xtuner.nn.moe", "def f():\n    from xtuner.models.decoder import Decoder", True),
        ("xtuner.nn.moe", "from ..models import decoder", True),
        ("xtuner.nn.moe", "from .router import Router\nfrom xtuner import ops\nfrom xtuner.batch import Batch", False),
        ("xtuner.data.pack", "import xtuner.models", True),
        ("xtuner.ops.permute", "from xtuner import _C, nn", True),
        ("xtuner.engine.x", "from xtuner import recipes", True),
        ("xtuner.rl.x", "from xtuner.engine import trainer", False),
        ("xtuner.engine.x", "from xtuner.ops import permute", False),
        ("xtuner.config.x", "from xtuner.nn import moe", True),
        ("xtuner.config.x", "from xtuner.errors import ConfigError", False),
        ("xtuner", "from xtuner import _C", False),
        ("xtuner", "from xtuner import ops", True),
    ],
)
def test_the_python_check_sees_a_broken_arrow(module, source, broken):
    assert bool(broken_arrows(source, module)) == broken


def bad_includes(source: str, folder: str) -> list[str]:
    """Headers that a file of csrc/<folder> must not include."""
    problems = []
    for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source, re.MULTILINE):
        top = header.split("/")[0]
        ours = "/" in header and (top == "xtuner" or top in INCLUDES)
        if TORCH_HEADER.match(header):
            problems.append(f"{header}: the core is built without torch")
        elif PYTHON_HEADER.match(header) and folder != "python":
            problems.append(f"{header}: Python belongs in csrc/python")
        elif ours and top not in INCLUDES[folder]:
            problems.append(f"{header}: csrc/{folder} may include {', '.join(sorted(INCLUDES[folder]))}")
    return problems


def cpp_files() -> list[Path]:
    suffixes = {".h", ".hpp", ".cuh", ".cpp", ".cc", ".cu"}
    return sorted(f for f in (ROOT / "csrc").rglob("*") if f.suffix in suffixes)


def test_cpp_arrows():
    files = cpp_files()
    assert len(files) > 20
    problems = {
        str(f.relative_to(ROOT)): bad
        for f in files
        if (bad := bad_includes(f.read_text(), f.relative_to(ROOT / "csrc").parts[0]))
    }
    assert not problems


@pytest.mark.parametrize(
    ("folder", "source", "bad"),
    [
        ("cpu", "#include <torch/extension.h>", True),
        ("python", "#include <ATen/ATen.h>", True),
        ("ops", "#include <Python.h>", True),
        ("cpu", "  #  include <pybind11/pybind11.h>", True),
        ("python", "#include <pybind11/pybind11.h>", False),
        ("python", '#include "cpu/kernels.h"', True),
        ("cpu", '#include "ops/checks.h"', True),
        ("include", '#include "cpu/kernels.h"', True),
        ("ops", '#include "cpu/kernels.h"\n#include "xtuner/tensor.h"\n#include <vector>', False),
    ],
)
def test_the_cpp_check_sees_a_broken_arrow(folder, source, bad):
    assert bool(bad_includes(source, folder)) == bad
