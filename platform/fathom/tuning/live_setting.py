"""A setting of a study, run live: an engine built for it, its prompts, its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fathom.compute import ComputePolicy
from fathom.config import EngineConfig
from fathom.engine.engine import Engine
from fathom.settings import ConfigError
from fathom.tuning.live import LiveFigures, run_live
from fathom.tuning.live_parts import LivePart
from fathom.tuning.objective import Figures, compute_of, mean_figures, with_first_threshold
from fathom.tuning.rows import SAME, Source
from fathom.tuning.space import ENGINE
from fathom.tuning.study import Study
from fathom.tuning.study_live import ONLY


def run_setting(
    study: Study,
    setting: Mapping[str, Any],
    parts: Sequence[LivePart],
    compute: ComputePolicy | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[LiveFigures]:
    """Run a setting on the prompts of its exit's parts, each on an engine that is new.

    Args:
        compute: the setting's policy, if a point has it already with its first λ.

    Raises:
        ConfigError: where the engine is not the one that was traced.
        LiveError: for a request that fails.
    """
    name = setting.get("exit", ONLY)
    found = []
    for part in parts:
        source = part.rows.source
        if part.rows.exit != name:
            continue
        policy = compute or with_first_threshold(compute_of(setting, source.exit_cost), part.first)
        config = engine_config(study, setting, source)
        engine = Engine.from_config(config)
        try:
            check_engine(engine, source, study.exits_by_name[name].adapter)
            found.append(
                run_live(
                    engine, part.prompts, policy, new_tokens=study.live.new_tokens,
                    at_once=config.max_num_seqs, advance=advance,
                )
            )  # fmt: skip
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
                f"not {traced!r}. Name the adapter they were recorded with under exits (adapter: "
                f"{adapter or source.adapter!r} was taken), or record them again."
            )


def as_figures(found: Sequence[LiveFigures]) -> Figures:
    """Live figures as a trial has them: mean over the data sets."""
    return mean_figures(
        [
            Figures(
                quality=_of(each.quality.value),
                budget=_of(each.budget.value),
                tpot_ms=_of(each.tpot_ms.value),
                full_tpot_ms=_of(each.full_tpot_ms.value),
                exit_rate=_of(each.exit_rate.value),
                tokens_per_s=each.tokens_per_s,
                full_tokens_per_s=each.full_tokens_per_s,
            )
            for each in found
        ]
    )


def _of(value: float | None) -> float:
    assert value is not None
    return value
