"""A study: what `fathom tune` searches, over which settings, for what, as a YAML file says it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any

from fathom.compute import AcceptMode, Confidence, PolicyName
from fathom.settings import ConfigError, check_at_least, from_mapping, read_yaml

Setting = dict[str, Any]
"""One place in the space: a value for each dimension that its policy has."""

OWN = {
    PolicyName.THRESHOLD: ("exit_threshold",),
    PolicyName.BUDGET: ("budget",),
    PolicyName.ADAPTIVE: (),
}
"""Policies that a trace can replay, with the dimensions that they alone have."""

COMMON = ("mode", "policy", "confidence", "max_stack", "exit_temperature")


class Objective(StrEnum):
    """What is searched for."""

    QUALITY = "quality"  # share of tokens that are the full model's, up
    BUDGET = "budget"  # mean cost of a token as a share of a full one's, down
    TPOT = "tpot"  # predicted time per output token, one sequence at a time, down


class Searcher(StrEnum):
    """How settings are proposed."""

    OPTUNA = "optuna"  # tree-structured Parzen estimators, multi-objective
    RANDOM = "random"
    GRID = "grid"


class Scheduler(StrEnum):
    """Which trials see all the rows."""

    NONE = "none"  # all
    ASHA = "asha"  # those that hold their own on few, for studies with one objective


@dataclass(frozen=True, slots=True)
class Asha:
    """Asynchronous successive halving over rows; see ``fathom.tuning.asha``.

    Attributes:
        first_rows: of each trace at the lowest rung, at least.
        reduction_factor: times so many rows at the next one, to which one in so many comes.
    """

    first_rows: int = 500
    reduction_factor: int = 3


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
    """Dimensions as written: a value, a list of values, or ``{low, high}``."""

    mode: Any = ("exact", "free")
    policy: Any = ("threshold",)
    confidence: Any = ("softmax_gap",)
    exit_threshold: Any = field(default_factory=lambda: {"low": 0.05, "high": 1.0})
    budget: Any = field(default_factory=lambda: {"low": 0.5, "high": 1.0})
    max_stack: Any = 8
    exit_temperature: Any = 1.0

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
            )
        }
        for name, low, high in (
            ("exit_threshold", 0.0, 1.0),
            ("budget", 1e-9, 1.0),
            ("max_stack", 1, 64),
            ("exit_temperature", 0.25, 4.0),
        ):
            found[name] = _numbers(name, getattr(self, name), low, high)
        return found


_WHY_MODE = "what a trace says of them"
_WHY_POLICY = "what a trace can replay; `fathom calibrate fit` certifies risks"
_WHY_META = "measures that a trace holds"


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a setting must keep to be taken.

    Attributes:
        max_quality_loss: most tokens that may differ from the full model's, as a share; None: any.
        max_tpot_ms: most milliseconds a token, predicted; None: any.
    """

    max_quality_loss: float | None = None
    max_tpot_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """A study.

    Attributes:
        traces: files, relative to the study's own. They name the model and the adapter.
        trials: settings to try; a grid has as many as its size, and at most these.
        grid_steps: values of a range in a grid.
        choose_share: of each trace's requests that trials are replayed on; the points of the front
            are measured on the others, which have chosen nothing.
        max_rows: about so many rows of each trace at a trial, whole requests; 0: all.
        max_points: operating points that are kept of a larger front: those that span it best.
    """

    name: str = ""
    traces: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ("quality", "budget", "tpot")
    constraints: Constraints = field(default_factory=Constraints)
    space: Space = field(default_factory=Space)
    searcher: Searcher = Searcher.OPTUNA
    scheduler: Scheduler = Scheduler.NONE
    asha: Asha = field(default_factory=Asha)
    trials: int = 40
    seed: int = 0
    grid_steps: int = 5
    choose_share: float = 0.5
    max_rows: int = 0
    max_points: int = 12

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the field, its value and the remedy.
        """
        if not isinstance(self.name, str) or not self.name or "/" in self.name:
            raise ConfigError(f"name must be a word that names the study, got {self.name!r}.")
        traces = _list("traces", self.traces, "files of `fathom generate --trace`")
        if not all(isinstance(each, str) for each in traces):
            raise ConfigError(f"traces must be names of files, got {list(traces)!r}.")
        if twice := {Path(each).name for each in traces if _count(each, traces) > 1}:
            raise ConfigError(f"traces: {min(twice)!r} is there twice; name each data set once.")
        known = ", ".join(Objective)
        for each in _list("objectives", self.objectives, known):
            if each not in list(Objective):
                raise ConfigError(f"objectives must be some of {known}, got {each!r}.")
        if len(set(self.objectives)) < len(self.objectives):
            raise ConfigError(f"objectives: one is there twice in {list(self.objectives)!r}.")
        check_at_least(self, ("trials", "grid_steps", "max_points"), 1)
        check_at_least(self, ("seed", "max_rows"), 0)
        for name in ("trials", "grid_steps", "max_points", "seed", "max_rows"):
            if not isinstance(getattr(self, name), int):
                raise ConfigError(f"{name} must be an integer, got {getattr(self, name)!r}.")
        if not _is_number(self.choose_share) or not 0 < self.choose_share < 1:
            raise ConfigError(
                f"choose_share must be a share of the requests between 0 and 1, got "
                f"{self.choose_share!r}."
            )
        own = self.constraints
        for name, high in (("max_quality_loss", 1.0), ("max_tpot_ms", math.inf)):
            value = getattr(own, name)
            if value is not None and not (_is_number(value) and 0 < value <= high):
                what = "a share of tokens in (0, 1]" if high == 1 else "milliseconds above 0"
                raise ConfigError(f"constraints.{name} must be {what}, got {value!r}.")
        self._check_scheduler()
        self.space.dimensions()
        if self.searcher is Searcher.GRID and (size := len(list(self.grid()))) > self.trials:
            raise ConfigError(
                f"trials {self.trials} is too few for the grid, which has {size} settings: raise "
                "trials, or lower grid_steps or the choices."
            )

    def _check_scheduler(self) -> None:
        for name, low in (("first_rows", 1), ("reduction_factor", 2)):
            check_at_least(self.asha, (name,), low, "asha.")
            if not isinstance(value := getattr(self.asha, name), int):
                raise ConfigError(f"asha.{name} must be an integer, got {value!r}.")
        if self.scheduler is Scheduler.ASHA and len(self.objectives) > 1:
            raise ConfigError(
                f"scheduler asha compares trials by one objective, and objectives has "
                f"{len(self.objectives)}: {list(self.objectives)!r}. Keep one of them and hold the "
                "others by constraints, or take scheduler none."
            )

    @property
    def total(self) -> int:
        """Trials that the study takes."""
        return len(list(self.grid())) if self.searcher is Searcher.GRID else self.trials

    def grid(self) -> Iterator[Setting]:
        """All settings of the grid; a policy has its own dimensions and no others."""
        dimensions = self.space.dimensions()
        for policy in dimensions["policy"].values:
            names = [name for name in COMMON if name != "policy"] + list(OWN[PolicyName(policy)])
            for values in product(*(dimensions[n].steps(self.grid_steps) for n in names)):
                yield {"policy": policy, **dict(zip(names, values, strict=True))}

    def as_dict(self) -> dict[str, Any]:
        """The fields, plain."""
        return {
            **asdict(self),
            "searcher": self.searcher.value,
            "scheduler": self.scheduler.value,
        }


def load_study(path: Path) -> Study:
    """Read a study.

    Raises:
        ConfigError: for a file that cannot be read, or naming the first field at fault.
    """
    body = dict(read_yaml(path))
    body.setdefault("name", path.stem)
    try:
        for name in ("traces", "objectives"):
            if isinstance(value := body.get(name), list):
                body[name] = tuple(value)
        study = from_mapping(Study, body)
        study.validate()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return study


def _list(name: str, value: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or not value:
        shown = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"{name} must be a list of {what}, got {shown!r}.")
    return value


def _count(name: str, names: tuple[str, ...]) -> int:
    return sum(Path(each).name == Path(name).name for each in names)


def _is_number(value: Any) -> bool:
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
        if not _is_number(each) or not low <= each <= high or (whole and each != int(each)):
            raise ConfigError(f"{where} must be {kind} in [{low:g}, {high:g}], got {each!r}.")
    numbers = tuple(int(each) if whole else float(each) for each in numbers)
    if not isinstance(value, Mapping):
        return Dimension(values=tuple(dict.fromkeys(numbers)))
    if numbers[0] > numbers[1]:
        raise ConfigError(f"{where}.low {numbers[0]} is above high {numbers[1]}: swap them.")
    return Dimension(low=numbers[0], high=numbers[1])
