"""The fields of a study that need the engine: its exits, what runs live, and on which prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from fathom.settings import ConfigError, check_above_zero, check_at_least, from_mapping
from fathom.vllm.settings import VllmConfig

ONLY = ""
"""Name of the exit of a study that has but one."""


class Evaluation(StrEnum):
    """How a trial's figures come about."""

    REPLAY = "replay"  # on traces: thousands of settings a minute, dimensions of a request alone
    LIVE = "live"  # through the engine: dimensions of the engine too
    SERVED = "served"  # through an application on Ray Serve: its replicas too


class Baseline(StrEnum):
    """What finalists are compared with, beside mode ``full``."""

    NONE = "none"
    VLLM = "vllm"  # one replica of vLLM, at full depth


@dataclass(frozen=True, slots=True)
class Exit:
    """An exit of the model: a layer and a head, which its traces name.

    Attributes:
        traces: files, relative to the study's own, recorded with this exit.
        adapter: where the adapter is now: a folder, relative to the study's file, or a name that
            ships; empty takes what the traces name.
    """

    traces: tuple[str, ...] = ()
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Live:
    """What runs live.

    Attributes:
        prompts: the files of `fathom generate --prompts` that the traces were recorded from, one
            for each trace in their order, relative to the study's file; empty: nothing runs live.
        requests: of each file at most, taken from those that are held out from the trials; with
            ``evaluate: live`` and ``served``, trials take theirs from the others.
        new_tokens: most tokens of an answer.
        cpus: cores of a served application's replicas together, which each has an equal share of.
        baseline: with ``evaluate: served``, what answers the finalists' requests too, on as many
            cores. vllm: what vLLM needs for that, as in ``ServeConfig.vllm``.
    """

    prompts: tuple[str, ...] = ()
    requests: int = 16
    new_tokens: int = 64
    cpus: float = 2.0
    baseline: Baseline = Baseline.NONE
    vllm: VllmConfig = field(default_factory=VllmConfig)

    def check(self, traces: int) -> None:
        """Check every field.

        Args:
            traces: number of them at each exit.

        Raises:
            ConfigError: naming the field, its value and the remedy.
        """
        for name, low in (("requests", 2), ("new_tokens", 2)):
            check_at_least(self, (name,), low, "live.")
            if not isinstance(value := getattr(self, name), int):
                raise ConfigError(f"live.{name} must be an integer, got {value!r}.")
        check_above_zero(self, ("cpus",), "live.")
        if not self.cpus <= 4096:
            raise ConfigError(f"live.cpus must be at most 4096 cores, got {self.cpus!r}.")
        self.vllm.validate("live.vllm.")
        if not _is_names(self.prompts):
            raise ConfigError(
                f"live.prompts must be a list of files of `fathom generate --prompts`, got "
                f"{self.prompts!r}."
            )
        if self.prompts and len(self.prompts) != traces:
            raise ConfigError(
                f"live.prompts names {len(self.prompts)} files for {traces} traces: name for each "
                "trace the prompts that it was recorded from, in the same order."
            )


def read_exits(value: Any) -> dict[str, Exit]:
    """Exits by name, as a file says them: a mapping of ``{traces: [...], adapter: PATH}``.

    Raises:
        ConfigError: naming the exit at fault.
    """
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(
            "exits must be a mapping, from a name of each to {traces: [FILE], adapter: PATH}, got "
            f"{value!r}."
        )
    found = {}
    for name, body in value.items():
        where = f"exits.{name}"
        if not isinstance(name, str) or not name or "/" in name:
            raise ConfigError(f"exits: {name!r} must be a word that names the exit.")
        if not isinstance(body, Mapping):
            raise ConfigError(f"{where} must be {{traces: [FILE], adapter: PATH}}, got {body!r}.")
        found[name] = from_mapping(Exit, tuples(body, "traces"), f"{where}.")
    return found


def check_exits(exits: Mapping[str, Exit]) -> None:
    """Check the exits of a study.

    Raises:
        ConfigError: naming the field, its value and the remedy.
    """
    sizes = {name: len(own.traces) for name, own in exits.items()}
    for name, own in exits.items():
        where = f"exits.{name}." if name else ""
        if not _is_names(own.traces) or not own.traces:
            shown = list(own.traces) if isinstance(own.traces, tuple) else own.traces
            raise ConfigError(
                f"{where}traces must be a list of files of `fathom generate --trace`, got "
                f"{shown!r}."
            )
        files = [Path(each).name for each in own.traces]
        if twice := {each for each in files if files.count(each) > 1}:
            raise ConfigError(
                f"{where}traces: {min(twice)!r} is there twice; name each data set once."
            )
        if not isinstance(own.adapter, str):
            raise ConfigError(f"{where}adapter must be a name or a folder, got {own.adapter!r}.")
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"exits have different numbers of traces, {sizes}: trace the same prompts with each, "
            "or their figures are of different data."
        )


def tuples(body: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The mapping with the lists of these fields as tuples."""
    return {
        key: tuple(value) if key in names and isinstance(value, list) else value
        for key, value in body.items()
    }


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(each, str) and each for each in value)
