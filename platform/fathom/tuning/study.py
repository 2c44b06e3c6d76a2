"""A study: what `fathom tune` searches, over which settings, for what, as a YAML file says it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any

from fathom.compute import PolicyName
from fathom.settings import ConfigError, check_at_least, from_mapping, read_yaml
from fathom.tuning.space import (
    COMMON,
    LIVE_ONLY,
    OWN,
    SERVED,
    Dimension,
    Setting,
    Space,
    is_number,
)
from fathom.tuning.study_checks import check_evaluation
from fathom.tuning.study_live import (
    ONLY,
    Evaluation,
    Exit,
    Live,
    check_exits,
    read_exits,
    tuples,
)


class Objective(StrEnum):
    """What is searched for."""

    QUALITY = "quality"  # share of tokens that are the full model's, up
    BUDGET = "budget"  # mean cost of a token as a share of a full one's, down
    TPOT = "tpot"  # time per output token, down; predicted for one sequence at a time
    THROUGHPUT = "throughput"  # tokens a second of an engine at work, up; where trials run live


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
        traces: files, relative to the study's own. They name the model and the adapter. A study of
            several exits has none here, and ``exits`` by name.
        evaluate: how trials are measured. finalists: points of the front that are run live once
            the search is over, those that span it best, where there are ``live.prompts``.
        trials: settings to try; a grid has as many as its size, and at most these.
        grid_steps: values of a range in a grid.
        choose_share: of each trace's requests that trials are replayed on; the points of the front
            are measured on the others, which have chosen nothing.
        max_rows: about so many rows of each trace at a trial, whole requests; 0: all.
        max_points: operating points that are kept of a larger front: those that span it best.
    """

    name: str = ""
    traces: tuple[str, ...] = ()
    exits: dict[str, Exit] = field(default_factory=dict)
    evaluate: Evaluation = Evaluation.REPLAY
    live: Live = field(default_factory=Live)
    finalists: int = 4
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
        if self.exits and self.traces:
            raise ConfigError("traces: each of exits has its own; leave these out.")
        check_exits(self.exits_by_name)
        self.live.check(len(self.exits_by_name[self.first_exit].traces))
        known = ", ".join(Objective)
        for each in _list("objectives", self.objectives, known):
            if each not in list(Objective):
                raise ConfigError(f"objectives must be some of {known}, got {each!r}.")
        if len(set(self.objectives)) < len(self.objectives):
            raise ConfigError(f"objectives: one is there twice in {list(self.objectives)!r}.")
        check_at_least(self, ("trials", "grid_steps", "max_points"), 1)
        check_at_least(self, ("seed", "max_rows", "finalists"), 0)
        for name in ("trials", "grid_steps", "max_points", "seed", "max_rows", "finalists"):
            if not isinstance(getattr(self, name), int):
                raise ConfigError(f"{name} must be an integer, got {getattr(self, name)!r}.")
        if not is_number(self.choose_share) or not 0 < self.choose_share < 1:
            raise ConfigError(
                f"choose_share must be a share of the requests between 0 and 1, got "
                f"{self.choose_share!r}."
            )
        own = self.constraints
        for name, high in (("max_quality_loss", 1.0), ("max_tpot_ms", math.inf)):
            value = getattr(own, name)
            if value is not None and not (is_number(value) and 0 < value <= high):
                what = "a share of tokens in (0, 1]" if high == 1 else "milliseconds above 0"
                raise ConfigError(f"constraints.{name} must be {what}, got {value!r}.")
        self._check_scheduler()
        check_evaluation(self)
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
    def runs_live(self) -> bool:
        """Whether trials run the engine, in one process or in an application."""
        return self.evaluate is not Evaluation.REPLAY

    @property
    def is_served(self) -> bool:
        """Whether trials, and finalists, run an application."""
        return self.evaluate is Evaluation.SERVED

    @property
    def beyond_replay(self) -> tuple[str, ...]:
        """Dimensions that trials have and a replay cannot tell."""
        return {Evaluation.LIVE: LIVE_ONLY, Evaluation.SERVED: SERVED}.get(self.evaluate, ())

    @property
    def exits_by_name(self) -> dict[str, Exit]:
        """All exits; that of a study which names none is called ``ONLY``."""
        return self.exits or {ONLY: Exit(self.traces)}

    def located(self, folder: Path) -> Study:
        """The study with its adapters' folders as other processes find them.

        Args:
            folder: of the study's file.
        """
        exits = {
            name: replace(own, adapter=str((folder / own.adapter).resolve()))
            if own.adapter and (folder / own.adapter).exists()
            else own
            for name, own in self.exits.items()
        }
        return replace(self, exits=exits)

    @property
    def first_exit(self) -> str:
        """Name of the first exit."""
        return next(iter(self.exits_by_name))

    def dimensions(self) -> dict[str, Dimension]:
        """Dimensions of a trial by name, those that one policy alone has among them."""
        found = self.space.dimensions()
        if self.exits:
            found["exit"] = Dimension(values=tuple(self.exits))
        return found

    def names(self, policy: str) -> list[str]:
        """Names of a trial's dimensions under a policy."""
        exits = ["exit"] if self.exits else []
        return [*exits, *COMMON, *self.beyond_replay, *OWN[PolicyName(policy)]]

    @property
    def total(self) -> int:
        """Trials that the study takes."""
        return len(list(self.grid())) if self.searcher is Searcher.GRID else self.trials

    def grid(self) -> Iterator[Setting]:
        """All settings of the grid; a policy has its own dimensions and no others."""
        dimensions = self.dimensions()
        for policy in dimensions["policy"].values:
            names = [name for name in self.names(policy) if name != "policy"]
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
        body = tuples(body, "traces", "objectives")
        if "exits" in body:
            body["exits"] = read_exits(body["exits"])
        if isinstance(live := body.get("live"), Mapping):
            body["live"] = tuples(live, "prompts")
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
