"""The base of every config class: immutable, strict about names, with errors a person can act on."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from xtuner.errors import ConfigError


class ConfigBase(BaseModel):
    """A frozen pydantic model that refuses unknown fields. Fields carry `description`s; they are the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def parse(cls, values: dict[str, Any]):
        """Validate `values` (nested dicts). Raises ConfigError with one line per problem."""
        try:
            return cls.model_validate(values)
        except ValidationError as e:
            raise ConfigError("\n".join(_explain(cls, err) for err in e.errors())) from None


def _explain(root: type[BaseModel], error: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{path}: unknown field{_suggestion(root, error['loc'])}"
    if error["type"] == "missing":
        return f"{path}: required, but not given"
    message = error["msg"].removeprefix("Value error, ")
    return f"{path}={error['input']!r}: {message}" if path else message


def _suggestion(root: type[BaseModel], location: tuple) -> str:
    names = sorted(field_paths(root))
    wanted = ".".join(str(part) for part in location if not isinstance(part, int))
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.0)
    return f"; the nearest valid field is {near[0]}" if near else ""


def field_paths(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted field names below `cls`, sections included."""
    paths = []
    for name, info in cls.model_fields.items():
        paths.append(prefix + name)
        section = section_class(info.annotation)
        if section is not None:
            paths += field_paths(section, f"{prefix}{name}.")
    return paths


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The config class inside an annotation such as `MoEConfig | None`, or None for a plain value."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
