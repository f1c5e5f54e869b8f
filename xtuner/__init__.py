"""Training of mixture-of-experts language models on a compiled, torch-free kernel core.

Importing this package loads the compiled core but not torch.
"""

from xtuner import _C


def build_info() -> dict:
    """What the compiled core holds: version, compiler, backends built, CPU instruction set in use and available."""
    return _C.build_info()


__version__: str = build_info()["version"]
__all__ = ["__version__", "build_info"]
