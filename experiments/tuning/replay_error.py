"""How far a replay is from live: points from timid to bold, run both ways on the same requests.

python -m experiments.tuning.replay_error multi30k.parquet multi30k.jsonl --json replay_error.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fathom.commands.tune_live import LiveRuns
from fathom.tuning.finalists import Finalist, run_finalist
from fathom.tuning.live_setting import InProcess
from fathom.tuning.objective import compute_of, with_first_threshold
from fathom.tuning.study import Study
from fathom.tuning.study_live import Live
from fathom.tuning.study_traces import read_traces

BASE = {
    "mode": "free", "policy": "threshold", "confidence": "softmax_gap", "max_stack": 8,
    "exit_temperature": 1.0, "pause_drafting": False,
}  # fmt: skip
POINTS: list[dict[str, Any]] = [
    {"exit_threshold": 0.9},
    {"exit_threshold": 0.7},
    {"exit_threshold": 0.5, "max_stack": 2},
    {"exit_threshold": 0.4},
    {"exit_threshold": 0.3},
    {"confidence": "max_prob", "exit_threshold": 0.7},
    {"confidence": "entropy", "exit_threshold": 0.8, "max_stack": 4},
    {"confidence": "saturation", "policy": "budget", "budget": 0.85},
    {"policy": "budget", "budget": 0.8},
    {"policy": "budget", "budget": 0.7},
    {"policy": "budget", "budget": 0.6},
    {"policy": "adaptive"},
    {"mode": "exact", "exit_threshold": 0.5, "pause_drafting": False},
    {"mode": "exact", "exit_threshold": 0.2, "max_stack": 3, "pause_drafting": False},
    {"mode": "exact", "exit_threshold": 0.3, "pause_drafting": True},
    {"mode": "exact", "policy": "budget", "budget": 0.8},
]


def main() -> None:
    """Measure, a line a point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    study = Study(
        name="replay-error",
        traces=(str(args.trace.resolve()),),
        live=Live((str(args.prompts.resolve()),), args.requests, args.new_tokens),
    )
    study.validate()
    traces = read_traces(study, Path())
    parts = LiveRuns(study, Path(), traces, Path()).held_out
    rows: list[dict[str, Any]] = []
    for number, point in enumerate(POINTS):
        setting = {**BASE, **point}
        compute = compute_of(setting, parts[0].rows.source.exit_cost)
        compute = with_first_threshold(compute, parts[0].first)
        name = " ".join(str(value) for value in point.values())
        found = run_finalist(InProcess(study), Finalist(number, name, setting, compute), parts)
        rows += found.errors()
        own = {row["figure"]: row for row in found.errors()}
        exits, quality, speedup = (own[key] for key in ("exit_rate", "quality", "speedup"))
        inside = quality["ci_low"] <= quality["replay"] <= quality["ci_high"]
        print(
            f"{name:32} exits {exits['replay']:.3f} live {exits['live']:.3f} "
            f"({100 * exits['difference']:+.1f} points), quality {quality['replay']:.4f} live "
            f"{quality['live']:.4f} [{quality['ci_low']:.4f}, {quality['ci_high']:.4f}] "
            f"{'in' if inside else 'OUT'}, speed-up {speedup['replay']:.3f} live "
            f"{speedup['live']:.3f} [{speedup['ci_low']:.3f}, {speedup['ci_high']:.3f}]",
            flush=True,
        )
        if args.json is not None:
            args.json.write_text(json.dumps({"points": POINTS, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
