"""A CONFIG becomes one validated tree: Python file, TOML, JSON or a built-in recipe, plus `key.sub=value` overrides."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from xtuner.config.base import ConfigBase, section_class
from xtuner.errors import ConfigError


@dataclass(frozen=True)
class LoadedConfig:
    """`prepare`, when a Python CONFIG defines it, is called with the config once before training starts."""

    config: ConfigBase
    prepare: Callable[[Any], None] | None = None


def load_config(source: str, overrides: Sequence[str], cls: type[ConfigBase]) -> LoadedConfig:
    """Read `source` and apply `overrides`. Raises ConfigError naming the file, field or recipe at fault."""
    path = Path(source)
    prepare = None
    if path.suffix in (".toml", ".json"):
        values = _read_data_file(path)
    else:
        module = _import_file(path) if path.suffix == ".py" else _import_recipe(source)
        if not isinstance(getattr(module, "config", None), cls):
            raise ConfigError(f"{source}: must define `config`, a {cls.__name__}")
        values = module.config.model_dump(mode="json", exclude_unset=True)
        prepare = getattr(module, "prepare", None)
    for override in overrides:
        _apply(values, override, cls)
    return LoadedConfig(cls.parse(values), prepare)


def with_overrides(config: ConfigBase, overrides: Sequence[str]) -> ConfigBase:
    """Another config, with these `key.sub=value` changed. Raises ConfigError as `load_config` does."""
    values = config.model_dump(mode="json", exclude_unset=True)
    for override in overrides:
        _apply(values, override, type(config))
    return type(config).parse(values)


def save_config(config: ConfigBase, path: Path) -> None:
    """Write the resolved tree as JSON, itself a valid CONFIG."""
    path.write_text(config.model_dump_json(indent=2) + "\n")


def _read_data_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as e:  # both parsers raise subclasses of it
        raise ConfigError(f"{path}: {e}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a table of fields, not a {type(values).__name__}")
    return values


def _import_file(path: Path):
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location(f"xtuner_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_names() -> list[str]:
    """Names of the built-in recipes: the modules of xtuner.recipes."""
    # Found by name, like any CONFIG file: config does not depend on recipes, which import it.
    folders = importlib.util.find_spec("xtuner.recipes").submodule_search_locations
    return sorted(m.name for m in pkgutil.iter_modules(folders) if not m.name.endswith("_data"))


def _import_recipe(name: str):
    if name not in recipe_names():
        raise ConfigError(
            f"CONFIG={name}: neither a .py, .toml or .json file nor a recipe; recipes: {', '.join(recipe_names())}"
        )
    return importlib.import_module(f"xtuner.recipes.{name}")


def _apply(values: dict[str, Any], override: str, cls: type[BaseModel]) -> None:
    """Set one `key.sub=value` in the nested dict; the value is JSON where it parses as such, else a string."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override}: an override has the form key.sub=value")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    *sections, leaf = key.split(".")
    section = cls
    for name in sections:
        nested = values.get(name)
        if not isinstance(nested, dict):
            nested = values[name] = {}
        values = nested
        section = _descend(section, name)
    if section is not None and isinstance(value, str) and _is_tuple(section, leaf):
        value = value.split(",") if value else []
    values[leaf] = value


def _descend(cls: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    info = cls.model_fields.get(name) if cls is not None else None
    return section_class(info.annotation) if info is not None else None


def _is_tuple(cls: type[BaseModel], name: str) -> bool:
    info = cls.model_fields.get(name)
    return info is not None and getattr(info.annotation, "__origin__", None) is tuple


def describe_fields(config: BaseModel, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Rows (name, type, value, meaning) of every field, in the order of the tree; sections are unfolded."""
    rows = []
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            rows += describe_fields(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, _type_name(info.annotation), _value_text(value), info.description or ""))
    return rows


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        return annotation.__name__
    text = str(annotation).replace("typing.", "").replace("pathlib.", "").replace("NoneType", "None")
    return text.rsplit("xtuner.config.", 1)[-1] if "xtuner.config." in text else text


def _value_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(str(v) for v in value)
    return str(value)
