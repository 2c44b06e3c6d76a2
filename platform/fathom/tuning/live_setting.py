"""A setting of a study, run live: an engine built for it, its prompts, its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fathom.compute import ComputePolicy
from fathom.config import EngineConfig
from fathom.engine.costs import StageCosts
from fathom.engine.engine import Engine
from fathom.settings import ConfigError
from fathom.tuning.live import FULL, LiveFigures, run_live
from fathom.tuning.live_parts import LivePart
from fathom.tuning.objective import (
    Figures,
    compute_of,
    evaluate,
    mean_figures,
    with_first_threshold,
)
from fathom.tuning.rows import SAME, Source
from fathom.tuning.space import ENGINE
from fathom.tuning.study import Study
from fathom.tuning.study_live import ONLY


@dataclass(frozen=True, slots=True, eq=False)
class LiveTrials:
    """What live trials need beside their settings.

    Attributes:
        study: with adapters where this process finds them.
        parts: requests that they run. full: mode ``full`` on the engine of the space's first
            values, which times and throughputs of all trials are shares of.
    """

    study: Study
    parts: list[LivePart]
    full: Figures


def run_trial(setting: Mapping[str, Any], live: LiveTrials) -> Figures:
    """A live trial's figures."""
    found = as_figures(run_setting(live.study, setting, live.parts, beside_full=False))
    return replace(
        found, full_tpot_ms=live.full.full_tpot_ms, full_tokens_per_s=live.full.full_tokens_per_s
    )


def run_full(study: Study, parts: Sequence[LivePart]) -> Figures:
    """Mode ``full`` on the engine of the space's first values: what trials are compared with."""
    setting = {"exit": study.first_exit}
    found = as_figures(run_setting(study, setting, parts, compute=FULL, beside_full=False))
    return replace(found, full_tpot_ms=found.tpot_ms, full_tokens_per_s=found.tokens_per_s)


@dataclass(frozen=True, slots=True, eq=False)
class LiveRun:
    """What one part's requests gave, on an engine of these measured costs."""

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


def run_setting(
    study: Study,
    setting: Mapping[str, Any],
    parts: Sequence[LivePart],
    *,
    compute: ComputePolicy | None = None,
    beside_full: bool = True,
) -> list[LiveRun]:
    """Run a setting on the prompts of its exit's parts, each on an engine that is new.

    Args:
        compute: in place of the setting's own policy.
        beside_full: see ``run_live``.

    Raises:
        ConfigError: where the engine is not the one that was traced.
        LiveError: for a request that fails.
    """
    name = setting.get("exit", ONLY)
    found = []
    for part in parts:
        if part.rows.exit != name:
            continue
        source = part.rows.source
        policy = compute or with_first_threshold(compute_of(setting, source.exit_cost), part.first)
        config = engine_config(study, setting, source)
        engine = Engine.from_config(config)
        try:
            check_engine(engine, source, config.adapter)
            figures = run_live(
                engine,
                part.prompts,
                policy,
                new_tokens=study.live.new_tokens,
                at_once=config.max_num_seqs,
                beside_full=beside_full,
            )
            found.append(LiveRun(part, engine.stage_costs, figures))
        finally:
            engine.close()
    return found


def engine_config(study: Study, setting: Mapping[str, Any], source: Source) -> EngineConfig:
    """The engine of a setting: the traced one, with the setting's batch limits and threads.

    What a setting does not say is the space's first value.
    """
    dimensions = study.space.dimensions()
    values = {name: setting.get(name, dimensions[name].first) for name in ENGINE}
    adapter = study.exits_by_name[setting.get("exit", ONLY)].adapter
    return EngineConfig(
        model=source.model,
        dtype=source.dtype,
        adapter=adapter or source.adapter or "none",
        exit_layer=source.exit_layer,
        exit_vocab=source.exit_vocab,
        **values,
    )


def check_engine(engine: Engine, source: Source, adapter: str) -> None:
    """Check that an engine is the one that a trace was recorded on.

    Raises:
        ConfigError: naming what differs, both values and the remedy.
    """
    for name, what in SAME:
        ours, traced = getattr(engine.info, name), getattr(source, name)
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
