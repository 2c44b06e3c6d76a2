"""What runs settings live for a study: an engine in one process, or a whole application."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fathom.compute import ComputePolicy
from fathom.config import EngineConfig
from fathom.engine.costs import StageCosts
from fathom.settings import ConfigError
from fathom.tuning.live_figures import FULL, LiveFigures
from fathom.tuning.live_parts import LivePart
from fathom.tuning.objective import Figures, evaluate, mean_figures
from fathom.tuning.rows import SAME, Source
from fathom.tuning.space import ENGINE, SERVED_ONLY
from fathom.tuning.study import Study
from fathom.tuning.study_live import ONLY


@dataclass(frozen=True, slots=True, eq=False)
class LiveRun:
    """What one part's requests gave, on stages of these measured costs."""

    part: LivePart
    costs: StageCosts
    figures: LiveFigures

    def replay(self, setting: Mapping[str, Any]) -> Figures:
        """What the trace foretells of the same requests, at the engine's own costs.

        Those of the trace were measured on another day, maybe on another machine: in times, and in
        whether mode ``exact`` drafts at all, that would count as the replay's error.
        """
        source = replace(self.part.rows.source, costs=self.costs)
        return evaluate(setting, [(self.part.first, replace(self.part.rows, source=source))])


class Runner(Protocol):
    """Runs settings on prompts. It goes to other processes."""

    @property
    def study(self) -> Study:
        """With adapters where every process finds them."""
        ...

    @property
    def at_once(self) -> int:
        """Most settings that can run at the same time; 0: as many as there is room for."""
        ...

    def resources(self, setting: Mapping[str, Any]) -> dict[str, float]:
        """What the process that runs a setting reserves of Ray's resources."""
        ...

    def run(
        self,
        setting: Mapping[str, Any],
        parts: Sequence[LivePart],
        *,
        compute: ComputePolicy | None = None,
        beside_full: bool = True,
    ) -> list[LiveRun]:
        """Run a setting on the prompts of its exit's parts, each on engines that are new.

        Args:
            compute: in place of the setting's own policy.
            beside_full: in turns with mode ``full``; see ``live_figures.take_turns``.

        Raises:
            ConfigError: where the engine is not the one that was traced.
            LiveError: for a request that fails.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LiveTrials:
    """What live trials need beside their settings.

    Attributes:
        parts: requests that they run. full: mode ``full`` at the space's first values, which times
            and throughputs of all trials are shares of.
    """

    runner: Runner
    parts: list[LivePart]
    full: Figures

    def run(self, setting: Mapping[str, Any]) -> Figures:
        """A live trial's figures."""
        found = as_figures(self.runner.run(setting, self.parts, beside_full=False))
        return replace(
            found,
            full_tpot_ms=self.full.full_tpot_ms,
            full_tokens_per_s=self.full.full_tokens_per_s,
        )


def run_full(runner: Runner, parts: Sequence[LivePart]) -> Figures:
    """Mode ``full`` at the space's first values: what trials are compared with."""
    setting = {"exit": runner.study.first_exit}
    found = as_figures(runner.run(setting, parts, compute=FULL, beside_full=False))
    return replace(found, full_tpot_ms=found.tpot_ms, full_tokens_per_s=found.tokens_per_s)


def filled(study: Study, setting: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's and the application's dimensions; what a setting does not say is the space's
    first value.
    """
    dimensions = study.space.dimensions()
    names = (*ENGINE, *SERVED_ONLY)
    return {name: setting.get(name, dimensions[name].first) for name in names}


def engine_config(study: Study, setting: Mapping[str, Any], source: Source) -> EngineConfig:
    """The engine of a setting: the traced one, with the setting's limits, rules and threads."""
    values = filled(study, setting)
    adapter = study.exits_by_name[setting.get("exit", ONLY)].adapter
    return EngineConfig(
        model=source.model,
        dtype=source.dtype,
        quantization=source.quantization,
        adapter=adapter or source.adapter or "none",
        exit_layer=source.exit_layer,
        exit_vocab=source.exit_vocab,
        **{name: values[name] for name in ENGINE},
    )


def check_source(own: Mapping[str, Any], source: Source, adapter: str) -> None:
    """Check that an engine is the one that a trace was recorded on.

    Args:
        own: the engine's fields of ``rows.SAME``.

    Raises:
        ConfigError: naming what differs, both values and the remedy.
    """
    for name, what in SAME:
        ours, traced = own[name], getattr(source, name)
        if ours != traced:
            raise ConfigError(
                f"the engine to run live is of another {what} than the traces: {name} {ours!r}, "
                f"not {traced!r}. Name the adapter that they were recorded with under exits "
                f"({adapter!r} was taken), or record them again."
            )


def as_figures(found: Sequence[LiveRun]) -> Figures:
    """Live figures as a trial has them: mean over the data sets; 0 for what was not measured."""
    return mean_figures(
        [
            Figures(
                quality=each.quality.value or 0.0,
                budget=each.budget.value or 0.0,
                tpot_ms=each.tpot_ms.value or 0.0,
                full_tpot_ms=each.full_tpot_ms.value or 0.0,
                exit_rate=each.exit_rate.value or 0.0,
                tokens_per_s=each.tokens_per_s,
                full_tokens_per_s=each.full_tokens_per_s or 0.0,
            )
            for each in (run.figures for run in found)
        ]
    )
