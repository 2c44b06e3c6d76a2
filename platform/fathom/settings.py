"""Reading settings: frozen dataclasses out of mappings and YAML, errors that name the field."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the field, the value and the remedy."""


Config = TypeVar("Config")


def from_mapping(kind: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Build a config dataclass from a mapping, nested dataclasses included.

    Raises:
        ConfigError: for a key that the dataclass does not have, a nested value that is no mapping,
            or a name that is none of an enumeration's. Ranges are checked by ``validate``.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in fields:
            raise ConfigError(f"{name}: unknown setting; known: {', '.join(sorted(fields))}.")
        default: Any = fields[key].default_factory
        if isinstance(default, type) and dataclasses.is_dataclass(default):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name} must be a mapping, got {value!r}.")
            value = from_mapping(default, value, f"{name}.")
        elif isinstance(member := fields[key].default, StrEnum):
            value = _member(type(member), value, name)
        arguments[key] = value
    return kind(**arguments)


def _member(kind: type[StrEnum], value: Any, name: str) -> StrEnum:
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{name} must be one of {', '.join(kind)}, got {value!r}.") from None


def read_yaml(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read a YAML file whose top level is a mapping; an empty file is an empty one.

    Raises:
        ConfigError: for a file that is missing, or is no YAML mapping.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}.") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no valid YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: the top level must be a mapping, got {type(values).__name__}.")
    return values


def load_yaml(kind: type[Config], path: str | os.PathLike[str]) -> Config:
    """Read a config dataclass from a YAML file.

    Raises:
        ConfigError: for a file that is missing, is no YAML mapping, or has an unknown key.
    """
    return from_mapping(kind, read_yaml(path))


def check_at_least(config: Any, names: Sequence[str], low: float, where: str = "") -> None:
    """Check that fields are numbers of at least ``low``.

    Raises:
        ConfigError: naming the first that is not.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= low:
            raise ConfigError(f"{where}{name} must be at least {low:g}, got {value!r}.")


def check_above_zero(config: Any, names: Sequence[str], where: str = "") -> None:
    """Check that fields are numbers above 0.

    Raises:
        ConfigError: naming the first that is not.
    """
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"{where}{name} must be above 0, got {value!r}.")
