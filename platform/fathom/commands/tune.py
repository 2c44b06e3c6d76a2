"""``fathom tune``: from a study to a front of operating points."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.commands.options import UsageError, add_command
from fathom.commands.reports import check_output, machine, write_json
from fathom.commands.tune_folder import claim
from fathom.commands.tune_table import show

if TYPE_CHECKING:
    from fathom.commands.tune_live import LiveRuns
    from fathom.tuning.finalists import Verified
    from fathom.tuning.ledger import Trial
    from fathom.tuning.operating_points import OperatingPoints
    from fathom.tuning.runner import Runner
    from fathom.tuning.study import Study
    from fathom.tuning.study_runs import StudyRuns
    from fathom.tuning.study_traces import Traces

_EXAMPLES = """\
  fathom generate --prompts p.jsonl --json a.jsonl --mode free --exit-threshold 1 --trace t.parquet
  fathom tune study.yaml --json study.json           search, and write the front
  fathom tune study.yaml                             again after a kill: goes on, runs nothing twice
  fathom tune study.yaml --mlflow http://host:5000   runs go to a tracking server
  fathom serve --operating-points tune-study/points.yaml

study.yaml:
  traces: [t.parquet]                      # beside the study; they name the model and the adapter
  objectives: [quality, budget, tpot]      # agreement with full, share of compute, predicted time
  constraints: {max_quality_loss: 0.05}    # also max_tpot_ms
  space:                                   # a value, a list, or {low, high}
    mode: [exact, free]
    policy: [threshold, budget, adaptive]
    confidence: [softmax_gap, max_prob, entropy, saturation]
    exit_threshold: {low: 0.05, high: 1.0}
    budget: {low: 0.5, high: 1.0}
    max_stack: {low: 1, high: 16}
    exit_temperature: 1.0
  searcher: optuna                         # or random, or grid (grid_steps: 5)
  scheduler: none                          # or asha, with one objective: drops trials on few rows
  asha: {first_rows: 500, reduction_factor: 3}
  trials: 40
  seed: 0
  choose_share: 0.5                        # of the requests; the points are measured on the others
  max_rows: 0                              # of each trace at a trial; 0: all
  max_points: 12                           # kept of a larger front
  live:                                    # what the traces were recorded from: points run live
    prompts: [p.jsonl]
    requests: 16                           # of those that trials have not seen
    new_tokens: 64
  finalists: 4                             # of the points; the replay's error is reported
  evaluate: replay                         # live: trials run the engine, and the space may have
                                           #   threads, max_num_seqs, max_num_batched_tokens and
                                           #   flush_rule: [rate, full, eager]; the objectives may
                                           #   have throughput

how many shallow and deep replicas? each trial starts an application on Ray Serve and loads it:
  evaluate: served
  live: {prompts: [p.jsonl], cpus: 2}      # cores of all its replicas, an equal share each
  objectives: [throughput, tpot]
  space: {replica_ratio: ["1:1", "2:1", "1:2", fused], max_num_seqs: 8}   # requests under way
  searcher: grid
  # live: {..., baseline: vllm, vllm: {python: /opt/vllm/bin/python}}   finalists beside vLLM on the
  #   same cores, requests and dtype; its environment has Fathom and the same Ray; empty: this one
A point's note has its ratio, and the options by which `fathom serve` runs the same.

several exits in one study, each with a file of points of its own, in place of traces:
  exits:
    early: {traces: [early.parquet], adapter: ./early}
    late: {traces: [late.parquet]}         # the adapter's name in its trace

A replay generates nothing. The MLflow UI on the default store:
  mlflow ui --backend-store-uri sqlite:///tune-study/mlflow.db
"""


def add_parser(commands: Any) -> None:
    """Declare the options."""
    parser = add_command(
        commands,
        "tune",
        run,
        about="search for operating points, by a study over traces",
        examples=_EXAMPLES,
    )
    parser.add_argument("study", type=Path, metavar="STUDY", help="the study (YAML)")
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="trials, MLflow's SQLite, the front (default: tune-NAME)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="operating points of the front (default: points.yaml in the work folder)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write trials and front here")
    parser.add_argument("--mlflow", default="", metavar="URI", help="tracking server, or `none`")
    parser.add_argument(
        "--parallel", type=int, default=0, metavar="N", help="trials at a time; 0: one a core"
    )


def run(args: argparse.Namespace) -> int:
    """Search, and write the front."""
    from fathom.tuning.study import load_study

    if args.parallel < 0:
        raise UsageError(f"--parallel must be at least 0, got {args.parallel}.")
    study = load_study(args.study)
    _check_installed(args.mlflow)
    for path in (args.json, args.out, args.work_dir):
        check_output(path)
    from fathom.tuning.figures import draw_study
    from fathom.tuning.study_traces import read_traces

    folder = args.study.resolve().parent
    traces = read_traces(study, folder)
    work_dir: Path = args.work_dir or Path(f"tune-{study.name}")
    live = None
    if study.live.prompts:
        from fathom.commands.tune_live import LiveRuns

        live = LiveRuns(study, folder, traces, work_dir)
    work_dir.mkdir(exist_ok=True)
    claim(work_dir, study, traces)
    out: Path = args.out or work_dir / "points.yaml"
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        runs = None
        if args.mlflow != "none":
            from fathom.tuning.study_runs import StudyRuns

            # What it does to its own tables is nobody's business.
            logging.getLogger("alembic").setLevel(logging.WARNING)
            runs = stack.enter_context(StudyRuns(study, args.study, traces, work_dir, args.mlflow))
        runner = stack.enter_context(_runner(study if live is None else live.study, work_dir))
        trials = _search(study, traces, work_dir, args.parallel, runs, live, runner)

        def verify(points: Mapping[str, OperatingPoints]) -> Sequence[Verified]:
            return [] if live is None else live.verify(runner, trials, points, args.parallel, runs)

        def compare(verified: Sequence[Verified]) -> dict[str, Any] | None:
            return None if live is None else live.baseline(runner, verified, runs)

        report = _finish(study, traces, trials, out, verify, compare)
        report["seconds"] = round(time.perf_counter() - start, 3)
        drawn = draw_study(study, traces, trials, report["front"], work_dir / "figures")
        report["figures"] = [str(path) for path in drawn.files]
        report["figures_skipped"] = drawn.skipped
        report["mlflow_run_id"] = None if runs is None else runs.run_id
        write_json(work_dir / "front.json", report)
        if runs is not None:
            written = [Path(name) for name in report["points_files"]]
            runs.finish(trials, [work_dir / "front.json", *written], drawn.files)
    if args.json is not None:
        write_json(args.json, {"meta": machine(), **report})
    return show(study, report)


def _check_installed(mlflow: str) -> None:
    wanted = ["optuna", "matplotlib", *([] if mlflow == "none" else ["mlflow"])]
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"a study needs {name}, which is not installed: "
                "python -m pip install 'fathom-serve[train]'."
            )


@contextlib.contextmanager
def _runner(study: Study, work_dir: Path) -> Iterator[Runner]:
    """Ray, which is left as it was, and what runs settings live on it."""
    if study.is_served:
        from deployments.trials import applications

        with applications(study, work_dir) as served:
            yield served
        return
    import ray

    from deployments.cluster import start_ray
    from fathom.tuning.live_setting import InProcess

    started = not ray.is_initialized()
    try:
        if started:
            start_ray(0)
        yield InProcess(study)
    finally:
        if started:
            ray.shutdown()


def _search(
    study: Study,
    traces: Traces,
    work_dir: Path,
    parallel: int,
    runs: StudyRuns | None,
    live: LiveRuns | None,
    runner: Runner,
) -> list[Trial]:
    """Run what is left of the trials, with a line of progress."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fathom.tuning.search import search
    from fathom.tuning.study_points import volume

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    seen: list[Trial] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("hypervolume {task.fields[volume]:.4f}"),
    )  # fmt: skip
    on_engine = live.for_trials(runner) if live is not None and study.runs_live else None
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as progress:
        task = progress.add_task(study.name, total=study.total, volume=0.0)

        def on_trials(new: Sequence[Trial]) -> None:
            seen.extend(new)
            progress.update(task, completed=len(seen), volume=volume(study, seen))
            if runs is not None:
                runs.add(new)

        return search(
            study, traces.parts, work_dir, parallel=parallel, live=on_engine, on_trials=on_trials
        )


def _finish(
    study: Study,
    traces: Traces,
    trials: Sequence[Trial],
    out: Path,
    verify: Callable[[Mapping[str, OperatingPoints]], Sequence[Verified]],
    compare: Callable[[Sequence[Verified]], dict[str, Any] | None],
) -> dict[str, Any]:
    """Write the front as operating points, if there is one; returns the report.

    Args:
        verify: runs finalists live. The points are written before, and again with what it found.
        compare: runs what the finalists are compared with, where the study names something.
    """
    from fathom.tuning.study_points import front, front_rows, make_points, volume, with_live

    rows: list[dict[str, Any]] = []
    files: list[str] = []
    errors: list[dict[str, Any]] = []
    baseline = None
    if front(study, trials):
        points = make_points(study, traces, trials)
        files = _save(points, out)
        if verified := verify(points):
            points = with_live(points, {each.point: each.measured() for each in verified})
            _save(points, out)
            baseline = compare(verified)
        errors = [row for each in verified for row in each.errors()]
        rows = front_rows(study, trials, points)
    return {
        "study": study.as_dict(),
        "trials": len(trials),
        "hypervolume": volume(study, trials),
        "front": rows,
        "points_files": files,
        "replay_error": errors,
        "baseline": baseline,
    }


def _save(points: Mapping[str, OperatingPoints], out: Path) -> list[str]:
    files = {points_file(out, name): own for name, own in points.items()}
    for path, own in files.items():
        own.save(path)
    return [str(path) for path in files]


def points_file(out: Path, name: str) -> Path:
    """Where the points of an exit go; those of a study's only one are in ``out`` itself."""
    return out.with_name(f"{out.stem}-{name}{out.suffix}") if name else out
