"""A study whose processes are killed at random, again and again, until it is done all the same.

    python -m experiments.tuning.kills translated.parquet --kills 20 --json kills.json

Every run of `fathom tune` but the last gets SIGKILL for its whole process group: some seconds after
its start, at a file of a trial, or when nothing is left but the front, its figures and MLflow. Then
the same command goes on. What is asked at the end: is every trial there once, was none run again,
has MLflow one finished run for each and none that seems to run, is the front that of a study that
nobody disturbed. Optuna draws anew after a kill, so the front is compared with a grid only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from fathom.commands.reports import check_output, machine, write_json

SPACES: dict[str, dict[str, Any]] = {
    "optuna": {
        "policy": ["threshold", "budget", "adaptive"],
        "confidence": ["softmax_gap", "max_prob"],
        "max_stack": {"low": 1, "high": 12},
    },
    "grid": {
        "mode": "free",
        "policy": ["threshold", "budget"],
        "confidence": ["softmax_gap", "max_prob"],
        "max_stack": [4, 8],
    },
}
NAME = "killed"
PHASES = ("start", "trials", "end")
KINDS = ("begun", "rung-*", "done")
_ENDS_S = 120.0


class Killed:
    """A study in a folder of its own, run by the command line."""

    def __init__(self, folder: Path, body: dict[str, Any], parallel: int, uri: str) -> None:
        self.folder = folder
        self.total = 0
        self._log = (folder / "log").open("a")
        self._command = [sys.executable, "-m", "fathom.cli", "tune", f"{NAME}.yaml"]
        self._command += ["--parallel", str(parallel), "--json", "out.json"]
        self._command += ["--mlflow", uri] if uri else []
        (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(body))

    def start(self) -> subprocess.Popen[bytes]:
        """Run it in the background, in a process group of its own."""
        return subprocess.Popen(
            self._command, cwd=self.folder, stdout=self._log, stderr=self._log,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def files(self) -> dict[str, tuple[int, str]]:
        """When each file of a trial was written, and what it says, by name."""
        trials = self.folder / f"tune-{NAME}" / "trials"
        found = [path for kind in KINDS for path in trials.glob(f"*.{kind}.json")]
        return {path.name: (path.stat().st_mtime_ns, path.read_text()) for path in found}

    def words(self) -> str:
        """The end of what it said."""
        return (self.folder / "log").read_text()[-3000:]


def kill(search: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the whole group at once; what Ray has in other groups must end by itself.

    Raises:
        RuntimeError: if it does not.
    """
    try:
        family = psutil.Process(search.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    os.killpg(search.pid, signal.SIGKILL)
    search.wait()
    _, left = psutil.wait_procs(family, timeout=_ENDS_S)
    if left:
        raise RuntimeError(f"still running {_ENDS_S:g} s after its end: {left}")


def moment(
    study: Killed,
    search: subprocess.Popen[bytes],
    phase: str,
    whole_s: float,
    chance: random.Random,
) -> None:
    """Wait until a random moment of a phase, or until the run has ended.

    Args:
        whole_s: about what a run takes that has nothing left to search.
    """
    start = time.monotonic()
    until: Callable[[], bool]
    if phase == "trials":
        wanted = len(study.files()) + chance.randint(1, 12)
        until = lambda: len(study.files()) >= wanted or done(study) == study.total  # noqa: E731
    else:
        begin = 0.0 if phase == "start" else 0.4 * whole_s
        after = chance.uniform(begin, begin + 0.6 * whole_s)
        until = lambda: time.monotonic() - start >= after  # noqa: E731
    while search.poll() is None and not until():
        time.sleep(0.02)
    if phase == "trials" and search.poll() is None:
        time.sleep(chance.uniform(0, 0.5))


def done(study: Killed) -> int:
    """Trials that are done."""
    return len(list((study.folder / f"tune-{NAME}" / "trials").glob("*.done.json")))


def disturbed(study: Killed, kills: int, chance: random.Random) -> dict[str, Any]:
    """Kill a study so often, and let it end.

    Returns:
        ``kills`` with the phase, the seconds and the trials that were done then; ``repeated``:
        files of trials that changed after they had been written.

    Raises:
        RuntimeError: if a run fails by itself.
    """
    known: dict[str, tuple[int, str]] = {}
    repeated: list[str] = []
    landed: list[dict[str, Any]] = []
    whole_s, ended = 20.0, 0
    while len(landed) < kills:
        # A third of the kills in each phase; its end comes when nothing is left to search.
        finished = done(study) == study.total
        phase = "end" if finished else PHASES[len(landed) % 2]
        if not finished and len(landed) >= 2 * kills // 3:
            phase = "rest"
        start = time.monotonic()
        search = study.start()
        if phase == "rest":
            search.wait()
        else:
            moment(study, search, phase, whole_s, chance)
        lasted = time.monotonic() - start
        if search.poll() is None:
            kill(search)
            landed.append({"phase": phase, "after_s": round(lasted, 2), "done": done(study)})
            print(f"kill {len(landed)}: {landed[-1]}", file=sys.stderr, flush=True)
        elif search.returncode:
            raise RuntimeError(f"a run failed by itself, with {search.returncode}: {study.words()}")
        else:
            ended += 1
            whole_s = lasted if finished else whole_s
        now = study.files()
        repeated += [name for name, each in known.items() if now.get(name) != each]
        known = now
    search = study.start()
    if search.wait():
        raise RuntimeError(f"the last run failed, with {search.returncode}: {study.words()}")
    now = study.files()
    repeated += [name for name, each in known.items() if now.get(name) != each]
    return {"kills": landed, "ended_before_the_kill": ended, "repeated": repeated}


def checked(study: Killed, uri: str) -> dict[str, Any]:
    """What is wrong with a study that is done; every list of it should be empty."""
    import mlflow

    report = json.loads((study.folder / "out.json").read_text())
    names = [f"{number:05d}" for number in range(study.total)]
    files = study.files()
    done = {name[:5]: json.loads(text) for name, (_, text) in files.items() if ".done." in name}
    begun = {name[:5]: json.loads(text) for name, (_, text) in files.items() if ".begun." in name}
    client = mlflow.MlflowClient(
        uri or f"sqlite:///{(study.folder / f'tune-{NAME}' / 'mlflow.db').resolve()}"
    )
    parent = client.get_run(report["mlflow_run_id"])
    runs = client.search_runs([parent.info.experiment_id], max_results=5000)
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags
               and run.info.run_name == NAME]  # fmt: skip
    ours = {run.info.run_id for run in parents}
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") in ours]
    finished = Counter(run.info.run_name for run in children if run.info.status == "FINISHED")
    wrong = [
        name
        for name in names
        for run in children
        if run.info.run_name == f"trial-{name}"
        and abs(run.data.metrics.get("quality", -1) - done[name]["figures"]["quality"]) > 1e-9
    ]
    steps = [m.step for m in client.get_metric_history(parent.info.run_id, "hypervolume")]
    return {
        "lost": [name for name in names if name not in done],
        "unknown": sorted((set(done) | set(begun)) - set(names)),
        "other_setting": [n for n in names if done[n]["setting"] != begun[n]["setting"]],
        "runs_not_finished": [
            f"{run.info.run_name} is {run.info.status}"
            for run in [*parents, *children]
            if run.info.status != "FINISHED"
        ],
        "trials_without_one_finished_run": [n for n in names if finished[f"trial-{n}"] != 1],
        "more_parents": [run.info.run_id for run in parents][1:],
        "other_figures": wrong,
        "steps_of_hypervolume_wrong": [] if steps == list(range(1, study.total + 1)) else steps,
    }


def front_of(study: Killed) -> list[Any]:
    """The front, by settings and figures, whatever its trials' numbers."""
    rows = json.loads((study.folder / "out.json").read_text())["front"]
    kept = [{k: v for k, v in row.items() if k not in ("trial", "point")} for row in rows]
    return sorted(kept, key=lambda row: json.dumps(row, sort_keys=True))


def made(folder: Path, trace: Path, args: argparse.Namespace) -> Killed:
    """The study in a new folder."""
    folder.mkdir()
    body = {
        "traces": [str(trace.resolve())], "trials": args.trials, "space": SPACES[args.searcher],
        "searcher": args.searcher, "grid_steps": 5, "seed": args.seed,
    }  # fmt: skip
    study = Killed(folder, body, args.parallel, args.mlflow)
    from fathom.tuning.study import load_study

    study.total = load_study(folder / f"{NAME}.yaml").total
    return study


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; 1 if anything was lost, repeated or left running."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("trace", type=Path, help="of `fathom generate --trace`")
    parser.add_argument("--searcher", choices=tuple(SPACES), default="optuna")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the kills and of the study")
    parser.add_argument(
        "--mlflow", default="", metavar="URI", help="a tracking server (default: SQLite)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    check_output(args.json)
    with tempfile.TemporaryDirectory(prefix="fathom-kills-") as name:
        study = made(Path(name, "disturbed"), args.trace, args)
        found = disturbed(study, args.kills, random.Random(args.seed))
        wrong = {"repeated": found.pop("repeated"), **checked(study, args.mlflow)}
        same = None
        if args.searcher == "grid":
            alone = made(Path(name, "alone"), args.trace, args)
            if status := alone.start().wait():
                raise RuntimeError(f"the undisturbed run failed with {status}: {alone.words()}")
            same = front_of(alone) == front_of(study)
    phases = Counter(each["phase"] for each in found["kills"])
    report = {"trials": study.total, "by_phase": dict(phases), **found, "wrong": wrong,
              "front_as_undisturbed": same}  # fmt: skip
    if args.json is not None:
        write_json(args.json, {"meta": machine(), **report})
    good = not any(wrong.values()) and same is not False
    print(f"{sum(phases.values())} kills ({', '.join(f'{n} in {p}' for p, n in phases.items())}), "
          f"{study.total} trials: {'nothing lost or repeated' if good else wrong}"
          + ("" if same is None else f"; front as undisturbed: {same}"))  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
