"""What a user can get wrong, by kind. All are ValueErrors, raised at the boundary, naming field, value and remedy."""

from __future__ import annotations

from pathlib import Path

# Of a process that ends itself because the run hangs, or for want of memory: the launcher must tell it from ranks that
# end because it did.
HANG_EXIT_CODE = 75
OUT_OF_MEMORY_EXIT_CODE = 76


class XTunerError(ValueError):
    """Base of all errors that are about the user's input rather than about our code."""


class ConfigError(XTunerError):
    """A configuration that cannot be read, does not validate, or does not fit the machine."""


class DataError(XTunerError):
    """A data file, sample or tokenizer that cannot be used; names file and line where there is one."""


class CheckpointError(XTunerError):
    """A checkpoint or Hugging Face directory that is missing, damaged or of another model."""


class OutOfMemoryError(XTunerError):
    """A run that needs more memory than there is. Its cause is the allocator's own error.

    phase     what was being done, such as "the backward pass"
    snapshot  file with what was held, for `python -m xtuner.run advise`; None outside a run
    """

    def __init__(self, phase: str, detail: str):
        super().__init__(f"out of memory in {phase}: {detail}")
        self.phase, self.detail = phase, detail
        self.snapshot: Path | None = None

    def locate(self, step: int | None, rank: int, snapshot: Path) -> None:
        """Say where in the run it was; steps count from 1."""
        self.snapshot = snapshot
        place = f"{self.phase} of step {step}" if step else self.phase
        self.args = (f"out of memory in {place} on rank {rank}: {self.detail}; what was held is in {snapshot}",)
