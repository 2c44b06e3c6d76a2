"""A setting of a study, run live in one process: an engine for it, its prompts, its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fathom.compute import ComputePolicy
from fathom.tuning.live import run_live
from fathom.tuning.live_parts import LivePart
from fathom.tuning.objective import compute_of, with_first_threshold
from fathom.tuning.rows import SAME
from fathom.tuning.runner import LiveRun, check_source, engine_config, filled
from fathom.tuning.study import Study
from fathom.tuning.study_live import ONLY


@dataclass(frozen=True, slots=True, eq=False)
class InProcess:
    """Runs settings on engines in the process that asks; see ``Runner``."""

    study: Study
    at_once: int = 0

    def resources(self, setting: Mapping[str, Any]) -> dict[str, float]:
        """A core for each of the engine's threads."""
        return {"CPU": filled(self.study, setting)["threads"]}

    def run(
        self,
        setting: Mapping[str, Any],
        parts: Sequence[LivePart],
        *,
        compute: ComputePolicy | None = None,
        beside_full: bool = True,
    ) -> list[LiveRun]:
        """See ``Runner.run``."""
        from fathom.engine.engine import Engine  # loads torch, which searches do without

        name = setting.get("exit", ONLY)
        found = []
        for part in (part for part in parts if part.rows.exit == name):
            source = part.rows.source
            own = compute or with_first_threshold(compute_of(setting, source.exit_cost), part.first)
            config = engine_config(self.study, setting, source)
            engine = Engine.from_config(config)
            try:
                info = {key: getattr(engine.info, key) for key, _ in SAME}
                check_source(info, source, config.adapter)
                figures = run_live(
                    engine,
                    part.prompts,
                    own,
                    new_tokens=self.study.live.new_tokens,
                    at_once=config.max_num_seqs,
                    beside_full=beside_full,
                )
                found.append(LiveRun(part, engine.stage_costs, figures))
            finally:
                engine.close()
        return found
