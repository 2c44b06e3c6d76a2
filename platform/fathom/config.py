"""Settings of an engine and of a server: frozen dataclasses, checked once, readable from YAML."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fathom.types import ComputePolicy, InvalidRequest

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = ("float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the field, the value and the remedy."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One engine: a model split at its exit layer, with a KV pool for each stage.

    Attributes:
        model: hub name, directory in Hugging Face form, or GGUF file.
        dtype: of weights, activations and KV blocks.
        device: a torch device string.
        threads: torch intra-op threads of this process; 0 leaves torch's setting.
        adapter: what was trained for early exits: ``auto`` (the default that ships for this
            model, else none), ``none`` (the model's own norm and LM head), the name of one that
            ships, or a path.
        exit_layer: k, the number of shallow layers; 0 takes the adapter's, or a third of the
            model's layers where there is none.
        exit_vocab: size of the frequency-ranked subset of the vocabulary that the exit head
            scores; 0 takes the adapter's choice, -1 forces the whole vocabulary.
        block_size: tokens a KV block.
        kv_cache_bytes: bytes of both stages' KV pools together.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most rows of one shallow or deep pass.
        max_model_len: longest prompt + completion in tokens; 0 takes the model's.
        prefix_caching: reuse the KV blocks of equal prefixes.
        compute: the compute policy of requests that do not say.
    """

    model: str = DEFAULT_MODEL
    dtype: str = "bfloat16"
    device: str = "cpu"
    threads: int = 0
    adapter: str = "auto"
    exit_layer: int = 0
    exit_vocab: int = 0
    block_size: int = 16
    kv_cache_bytes: int = 1 << 30
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int = 0
    prefix_caching: bool = True
    compute: ComputePolicy = field(default_factory=ComputePolicy)

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the first field out of range, its value and the remedy.
        """
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        for name, low in (
            ("threads", 0),
            ("exit_layer", 0),
            ("exit_vocab", -1),
            ("block_size", 1),
            ("kv_cache_bytes", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_model_len", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}.")
        if self.max_num_batched_tokens < self.compute.max_stack + 1:
            raise ConfigError(
                "max_num_batched_tokens must exceed compute.max_stack "
                f"({self.compute.max_stack}), got {self.max_num_batched_tokens}."
            )
        try:
            self.compute.validate()
        except InvalidRequest as error:
            raise ConfigError(f"compute.{error}") from error


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One server: an HTTP ingress in front of engine replicas.

    API keys are never part of a file: they come from ``FATHOM_API_KEY`` (several, separated by
    commas).

    Attributes:
        engine: what each replica runs.
        model_name: the name clients ask for; empty takes ``engine.model``.
        host, port: where HTTP binds. Without an API key only loopback addresses are allowed.
        num_replicas: fused replicas (shallow and deep stage in one process).
        cpus_per_replica: CPU cores of a replica, which is also its thread count.
        max_ongoing_requests, max_queued_requests: the server takes ``num_replicas *
            max_ongoing_requests + max_queued_requests`` requests at once, running and waiting;
            further ones are answered 429.
        request_timeout_s: deadline of a request that sets none.
        drain_s: seconds that a stopping replica lets its requests finish.
        stream_interval_s: a stream's first token leaves at once; afterwards tokens that come
            within this many seconds travel together. 0 sends each engine step's at once.
        max_body_bytes: largest request body.
        startup_timeout_s: seconds that a replica may take to load its model.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    model_name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    num_replicas: int = 1
    cpus_per_replica: float = 1
    max_ongoing_requests: int = 256
    max_queued_requests: int = 1024
    request_timeout_s: float = 600.0
    drain_s: float = 20.0
    stream_interval_s: float = 0.02
    max_body_bytes: int = 8 << 20
    startup_timeout_s: float = 600.0

    def validate(self) -> None:
        """Check every field, the engine's included.

        Raises:
            ConfigError: naming the first field out of range, its value and the remedy.
        """
        self.engine.validate()
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port must be from 1 to 65535, got {self.port!r}.")
        for name in (
            "num_replicas",
            "cpus_per_replica",
            "max_ongoing_requests",
            "max_queued_requests",
            "request_timeout_s",
            "max_body_bytes",
            "startup_timeout_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)!r}.")
        for name in ("drain_s", "stream_interval_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)!r}.")


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


def load_yaml(kind: type[Config], path: str | os.PathLike[str]) -> Config:
    """Read a config dataclass from a YAML file.

    Raises:
        ConfigError: for a file that is missing, is no YAML mapping, or has an unknown key.
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
    return from_mapping(kind, values)
