"""The space that a study searches: its dimensions, as written and as sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fathom.compute import AcceptMode, Confidence, PolicyName
from fathom.engine.flush_rules import FlushWhen
from fathom.settings import ConfigError
from fathom.tuning.ratios import ONE_EACH, check_ratio

Setting = dict[str, Any]
"""One place in the space: a value for each dimension that its policy has."""

OWN = {
    PolicyName.THRESHOLD: ("exit_threshold",),
    PolicyName.BUDGET: ("budget",),
    PolicyName.ADAPTIVE: (),
}
"""Policies that a trace can replay, with the dimensions that they alone have."""

COMMON = ("mode", "policy", "confidence", "max_stack", "exit_temperature", "pause_drafting")
"""Dimensions of all policies."""

LIVE_ONLY = ("threads", "max_num_seqs", "max_num_batched_tokens", "flush_rule")
"""Dimensions that a replay cannot tell."""

SERVED_ONLY = ("replica_ratio",)
"""Dimensions that an engine in one process cannot tell."""

SERVED = (*(name for name in LIVE_ONLY if name != "threads"), *SERVED_ONLY)
"""Dimensions of an application that a replay cannot tell; its threads follow from its cores."""

ENGINE = (*LIVE_ONLY, "pause_drafting")
"""Dimensions of the engine and not of a request, under their names in ``EngineConfig``."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """The values of one field: some, or all between two.

    Attributes:
        values: the choices; empty for a range. low, high: of the range, both in it.
    """

    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def first(self) -> Any:
        """The first choice, or the low end of the range."""
        return self.values[0] if self.values else self.low

    @property
    def single(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.values) == 1 if self.values else self.low == self.high

    @property
    def integer(self) -> bool:
        """Whether a range holds whole numbers alone."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def steps(self, count: int) -> list[Any]:
        """The choices, or so many values spread evenly over the range, ends included."""
        if self.values:
            return list(self.values)
        if count == 1 or self.low == self.high:
            return [self.low]
        spread = [self.low + (self.high - self.low) * i / (count - 1) for i in range(count)]
        return list(dict.fromkeys(round(v) for v in spread)) if self.integer else spread


@dataclass(frozen=True, slots=True)
class Space:
    """Dimensions as written: a value, a list of values, or ``{low, high}``.

    Attributes:
        pause_drafting: whether the engine drafts only where that pays.
        threads: of the engine. max_num_seqs: requests that share it; live, so many are always
            under way. max_num_batched_tokens: most rows of a pass. flush_rule: when sequences
            that wait get the deep stage. With ``evaluate: replay`` one value each, for what runs
            live afterwards.
        replica_ratio: shallow and deep replicas of an application, ``"2:1"``, or ``fused``; see
            ``fathom.tuning.ratios``. With ``evaluate: served`` alone.
    """

    mode: Any = ("exact", "free")
    policy: Any = ("threshold",)
    confidence: Any = ("softmax_gap",)
    exit_threshold: Any = field(default_factory=lambda: {"low": 0.05, "high": 1.0})
    budget: Any = field(default_factory=lambda: {"low": 0.5, "high": 1.0})
    max_stack: Any = 8
    exit_temperature: Any = 1.0
    threads: Any = 1
    max_num_seqs: Any = 1
    max_num_batched_tokens: Any = 512
    flush_rule: Any = "rate"
    pause_drafting: Any = True
    replica_ratio: Any = ONE_EACH

    def dimensions(self) -> dict[str, Dimension]:
        """The dimensions by name.

        Raises:
            ConfigError: naming the first that cannot be used, its value and the remedy.
        """
        found = {
            name: _choices(name, getattr(self, name), kind, why)
            for name, kind, why in (
                ("mode", (AcceptMode.EXACT, AcceptMode.FREE), _WHY_MODE),
                ("policy", tuple(OWN), _WHY_POLICY),
                ("confidence", tuple(c for c in Confidence if c is not Confidence.META), _WHY_META),
                ("flush_rule", tuple(FlushWhen), _WHY_FLUSH),
            )
        }
        for name, low, high in (
            ("exit_threshold", 0.0, 1.0),
            ("budget", 1e-9, 1.0),
            ("max_stack", 1, 64),
            ("exit_temperature", 0.25, 4.0),
            ("threads", 1, 1024),
            ("max_num_seqs", 1, 4096),
            ("max_num_batched_tokens", 2, 1 << 20),
        ):
            found[name] = _numbers(name, getattr(self, name), low, high)
        found["pause_drafting"] = _switch("pause_drafting", self.pause_drafting)
        found["replica_ratio"] = _ratios("replica_ratio", self.replica_ratio)
        return found


_WHY_MODE = "what a trace says of them"
_WHY_POLICY = "what a trace can replay; `fathom calibrate fit` certifies risks"
_WHY_META = "measures that a trace holds"
_WHY_FLUSH = "rules that an engine can flush by"


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; truth values are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _choices(name: str, value: Any, known: tuple[StrEnum, ...], why: str) -> Dimension:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for each in values or (None,):
        if each not in known:
            raise ConfigError(
                f"space.{name} must be some of {', '.join(known)} ({why}), got {each!r}."
            )
    return Dimension(values=tuple(str(each) for each in dict.fromkeys(values)))


def _numbers(name: str, value: Any, low: float, high: float) -> Dimension:
    """A dimension of numbers in [low, high], whole ones where ``low`` is."""
    where = f"space.{name}"
    if isinstance(value, Mapping):
        if set(value) != {"low", "high"}:
            raise ConfigError(f"{where} must be {{low: A, high: B}}, got {dict(value)!r}.")
        numbers: tuple[Any, ...] = (value["low"], value["high"])
    else:
        numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    whole = isinstance(low, int)
    kind = "integers" if whole else "numbers"
    for each in numbers or (None,):
        if not is_number(each) or not low <= each <= high or (whole and each != int(each)):
            raise ConfigError(f"{where} must be {kind} in [{low:g}, {high:g}], got {each!r}.")
    numbers = tuple(int(each) if whole else float(each) for each in numbers)
    if not isinstance(value, Mapping):
        return Dimension(values=tuple(dict.fromkeys(numbers)))
    if numbers[0] > numbers[1]:
        raise ConfigError(f"{where}.low {numbers[0]} is above high {numbers[1]}: swap them.")
    return Dimension(low=numbers[0], high=numbers[1])


def _switch(name: str, value: Any) -> Dimension:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for each in values or (None,):
        if not isinstance(each, bool):
            raise ConfigError(f"space.{name} must be true, false or both in a list, got {each!r}.")
    return Dimension(values=tuple(dict.fromkeys(values)))


def _ratios(name: str, value: Any) -> Dimension:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for each in values or (None,):
        check_ratio(f"space.{name}", each)
    return Dimension(values=tuple(dict.fromkeys(values)))
