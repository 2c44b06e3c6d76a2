"""Optuna against random search by hypervolume, and ASHA against none by time, at equal trials.

    python -m experiments.tuning.searchers a.parquet b.parquet --trials 120 --json searchers.json

One study over all the traces a seed. The seed also draws which requests are replayed, so that both
sides of a comparison see the same. One trial at a time, so that a seed gives the same again.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from deployments.cluster import start_ray
from fathom.commands.reports import check_output, machine, write_json
from fathom.tuning import asha
from fathom.tuning.ledger import Trial
from fathom.tuning.search import search
from fathom.tuning.study import Asha, Constraints, Scheduler, Searcher, Space, Study
from fathom.tuning.study_points import front, volume
from fathom.tuning.study_traces import Traces, read_traces

SPACE = Space(
    policy=["threshold", "budget", "adaptive"],
    confidence=["softmax_gap", "max_prob", "entropy", "saturation"],
    max_stack={"low": 1, "high": 16},
)


def run(study: Study, traces: Traces) -> tuple[list[Trial], float]:
    """A study's trials, by number, and the seconds that the search took."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        found = search(study, traces.parts, Path(folder), parallel=1, on_trials=lambda new: None)
        return found, time.perf_counter() - start


def searchers(study: Study, folder: Path, seeds: int) -> list[dict[str, Any]]:
    """Hypervolume of three objectives after a quarter, half and all of the trials."""
    counts = sorted({study.trials // 4, study.trials // 2, study.trials} - {0})
    rows = []
    for seed in range(seeds):
        for searcher in (Searcher.RANDOM, Searcher.OPTUNA):
            own = dataclasses.replace(study, seed=seed, searcher=searcher)
            trials, seconds = run(own, read_traces(own, folder))
            volumes = {str(count): volume(own, trials[:count]) for count in counts}
            rows.append(
                {
                    "seed": seed,
                    "searcher": searcher.value,
                    "seconds": round(seconds, 2),
                    "front": len(front(own, trials)),
                    "hypervolume": volumes,
                }
            )
            print(f"seed {seed} {searcher.value:6} {volumes}", flush=True)
    return rows


def replayed(study: Study, traces: Traces, trials: list[Trial]) -> float:
    """Rows that trials were replayed on, all rungs together, in trials on all rows."""
    levels = [sum(len(rows) for _, rows in parts) for parts in asha.rungs(study, traces.parts)]
    climbed = (levels if trial.rung is None else levels[: trial.rung + 1] for trial in trials)
    return sum(sum(own) for own in climbed) / levels[-1]


def schedulers(study: Study, folder: Path, seeds: int) -> list[dict[str, Any]]:
    """The best feasible predicted time a token, as a share of ``full``'s, and what it took."""
    rows = []
    for seed in range(seeds):
        for scheduler in (Scheduler.NONE, Scheduler.ASHA):
            own = dataclasses.replace(study, seed=seed, objectives=("tpot",), scheduler=scheduler)
            traces = read_traces(own, folder)
            trials, seconds = run(own, traces)
            best = front(own, trials)
            row = {
                "seed": seed,
                "scheduler": scheduler.value,
                "seconds": round(seconds, 2),
                "replay_seconds": round(sum(trial.seconds for trial in trials), 2),
                "replayed": round(replayed(own, traces, trials), 2),
                "on_all_rows": sum(trial.rung is None for trial in trials),
                "best": best[0].figures.losses(own)[0] if best else None,
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def _show(found: dict[str, Any]) -> None:
    if rows := found["searchers"]:
        sides = [[r["hypervolume"] for r in rows if r["searcher"] == s] for s in Searcher]
        optuna, random = sides[0], sides[1]
        for count in rows[0]["hypervolume"]:
            one, other = ([each[count] for each in side] for side in (optuna, random))
            wins = sum(a > b for a, b in zip(one, other, strict=True))
            print(
                f"{count} trials: Optuna {statistics.mean(one):.4f}, random "
                f"{statistics.mean(other):.4f}; Optuna's is the larger for {wins} of {len(one)} "
                "seeds"
            )
    if rows := found["schedulers"]:
        for name in Scheduler:
            own = [row for row in rows if row["scheduler"] == name]
            best = [row["best"] for row in own if row["best"] is not None]
            mean = f"{statistics.mean(best):.4f}" if best else "none"
            print(
                f"{name.value}: best {mean} of full's time a token "
                f"({len(best)} of {len(own)} seeds found one), "
                f"{statistics.mean(r['replayed'] for r in own):.1f} trials' worth of rows, "
                f"{statistics.mean(r['replay_seconds'] for r in own):.1f} s of replay, "
                f"{statistics.mean(r['seconds'] for r in own):.1f} s in all, "
                f"{statistics.mean(r['on_all_rows'] for r in own):.1f} trials on all rows"
            )


def main() -> None:
    """Run the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", type=Path, nargs="+", help="of `fathom generate --trace`")
    parser.add_argument("--trials", type=int, default=120, help="of each study; default: 120")
    parser.add_argument("--seeds", type=int, default=5, help="default: 5")
    parser.add_argument("--only", choices=("searchers", "schedulers"), help="default: both")
    parser.add_argument("--max-quality-loss", type=float, default=0.05, help="default: 0.05")
    parser.add_argument("--max-rows", type=int, default=0, help="of each trace; default: all")
    parser.add_argument("--first-rows", type=int, default=Asha().first_rows, help="of ASHA")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every seed's figures here")
    args = parser.parse_args()
    check_output(args.json)
    study = Study(
        name="compare",
        traces=tuple(str(path.resolve()) for path in args.traces),
        constraints=Constraints(max_quality_loss=args.max_quality_loss),
        space=SPACE,
        trials=args.trials,
        max_rows=args.max_rows,
        asha=Asha(first_rows=args.first_rows),
    )
    study.validate()
    start_ray(0)
    folder = Path()
    found: dict[str, Any] = {
        "searchers": [] if args.only == "schedulers" else searchers(study, folder, args.seeds),
        "schedulers": [] if args.only == "searchers" else schedulers(study, folder, args.seeds),
    }
    _show(found)
    if args.json is not None:
        body = {**study.as_dict(), "traces": [path.name for path in args.traces]}
        write_json(args.json, {"meta": machine(), "study": body, **found})


if __name__ == "__main__":
    main()
