"""What a user can get wrong, by kind. All are ValueErrors, raised at the boundary, naming field, value and remedy."""

# Of a process that ends itself because the run hangs: the launcher must tell it from ranks that it then kills itself.
HANG_EXIT_CODE = 75


class XTunerError(ValueError):
    """Base of all errors that are about the user's input rather than about our code."""


class ConfigError(XTunerError):
    """A configuration that cannot be read, does not validate, or does not fit the machine."""


class DataError(XTunerError):
    """A data file, sample or tokenizer that cannot be used; names file and line where there is one."""


class CheckpointError(XTunerError):
    """A checkpoint or Hugging Face directory that is missing, damaged or of another model."""
