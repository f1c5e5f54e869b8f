"""The arrows of the architecture: who may import whom.

    run -> {recipes, rl, engine, plan} -> {checkpoint, optim, data, models} -> {nn, parallel} -> ops -> _C
Siblings do not import each other (rl and plan may use engine); everyone may import config, errors and batch.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [{"run"}, {"recipes", "rl", "engine", "plan"}, {"checkpoint", "optim", "data", "models"}, {"nn", "parallel"},
          {"ops"}, {"_C"}]  # fmt: skip
FOR_ALL = {"config", "errors", "batch"}
EXTRA = {("rl", "engine"), ("plan", "engine")}
# config names the recipes it can load; the package root loads the core.
EXCEPTIONS = {("config", "recipes"), ("", "_C")}


def level(part: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if part in layer), None)


def imported_parts(source: str) -> set[str]:
    """First components below `xtuner` of everything the source imports, wherever the import stands."""
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module] + [f"{node.module}.{a.name}" for a in node.names] * (node.module == "xtuner")
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError("relative import: write the full name")
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("xtuner.")}
    return {p for p in parts if not p.startswith("__")}


def broken_arrow(importer: str, imported: str) -> str | None:
    """Why `importer` must not import `imported`, or None when it may."""
    if imported in FOR_ALL or importer == imported or (importer, imported) in EXTRA | EXCEPTIONS:
        return None
    if importer in FOR_ALL or importer == "":
        return f"{importer or 'the package root'} may import only {', '.join(sorted(FOR_ALL))}, not {imported}"
    mine, theirs = level(importer), level(imported)
    if theirs is None:
        return None  # a name of the package root, such as build_info
    if mine is None:
        return f"{importer} has no place in the architecture"
    if theirs <= mine:
        return f"{importer} must not import {imported}, which is {'beside' if theirs == mine else 'above'} it"
    return None


def problems(importer: str, source: str) -> list[str]:
    return [why for part in sorted(imported_parts(source)) if (why := broken_arrow(importer, part))]


def python_files():
    for path in sorted((ROOT / "xtuner").rglob("*.py")):
        relative = path.relative_to(ROOT / "xtuner")
        part = relative.parts[0].removesuffix(".py")
        yield path, "" if part == "__init__" else part


def test_python_arrows():
    found = [f"{p.relative_to(ROOT)}: {why}" for p, part in python_files() for why in problems(part, p.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("nn", "from xtuner.parallel import World"),
        ("nn", "def f():\n    import xtuner.models"),
        ("data", "from xtuner import models"),
        ("engine", "from xtuner.rl import x"),
        ("ops", "from xtuner.nn.moe import MoE"),
        ("errors", "from xtuner.engine import x"),
        ("batch", "from xtuner import _C"),
        ("newcomer", "from xtuner.ops import permute"),
    ],
)
def test_a_broken_arrow_is_seen(importer, source):
    assert problems(importer, source)


def test_nn_knows_nothing_of_ranks():
    for path in (ROOT / "xtuner" / "nn").rglob("*.py"):
        assert "torch.distributed" not in path.read_text(), path


def test_the_core_is_free_of_torch_and_python():
    forbidden = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|Python\.h|pybind11)')
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            hits = [m.group(1) for m in forbidden.finditer(path.read_text())]
            allowed = {"Python.h", "pybind11"} if "python" in path.relative_to(ROOT / "csrc").parts else set()
            assert set(hits) <= allowed, (path, hits)
    assert forbidden.search('#include <torch/extension.h>') and forbidden.search('#include "ATen/ATen.h"')
