"""FREE's comparison as a study: full, exact, static exit, CALM, FREE, risk, budget.

    python -m experiments.free.run --data DIR --work free-work

Records a trace of the requests that choose thresholds, chooses them (`fathom calibrate fit`,
`fathom tune`), runs all methods live on other requests, notes the runs in MLflow (experiment
``fathom-free``), and writes tables and figures beside this file. It can be interrupted and goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.free.measure import figures, measure
from experiments.free.methods import Methods, calibrate, record
from experiments.free.report import write_figure, write_tables
from experiments.free.tasks import FREE_TASKS, FreeTask, judged
from fathom.config import EngineConfig
from fathom.evaluation.answers import Advance
from fathom.evaluation.errors import EvaluationError
from fathom.training.tracking import Tracker
from fathom.tuning.operating_points import compute_fields

EXPERIMENT = "fathom-free"
HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Trace, choose, measure, report."""
    args = _options(arguments)
    if args.data is not None:
        os.environ["FATHOM_DATA"] = str(args.data)
    args.work.mkdir(parents=True, exist_ok=True)
    store = f"sqlite:///{(args.work / 'mlflow.db').resolve()}"
    try:
        # Before the first minutes of work: all data must be there.
        loads = {own: judged(own, args.requests or own.requests) for own in args.tasks}
        results = []
        for own, items in loads.items():
            folder = args.work / own.name
            methods = calibrate(own, folder, record(own, folder, args.threads), store)
            config = EngineConfig(
                adapter=own.adapter,
                threads=args.threads,
                max_num_seqs=args.at_once,
                prefix_caching=False,
                pause_drafting=False,  # methods are compared, not what serving makes of them
            )
            with _progress() as progress:
                found = measure(own, items, methods.methods, folder, config, progress)
            found["missing"] = methods.missing
            (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
            figure = write_figure(found, args.out / f"{own.name}.png")
            _track(own, folder, store, methods, found, figure)
            results.append(found)
    except EvaluationError as error:
        raise SystemExit(str(error)) from error
    write_tables(args.out / "README.md", results)
    print(f"{args.out}: tables and figures; runs: mlflow ui --backend-store-uri {store}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: FATHOM_DATA")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="traces, answers")
    parser.add_argument(
        "--tasks", type=_tasks, default="multi30k,dialogsum", metavar="LIST",
        help=f"of {', '.join(FREE_TASKS)}; default: multi30k,dialogsum",
    )  # fmt: skip
    parser.add_argument(
        "--requests", type=int, default=0, metavar="N", help="a task; default: the task's own"
    )
    parser.add_argument(
        "--at-once", type=int, default=1, metavar="N",
        help="requests that share the engine; default: 1, as in the paper",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="default: here")
    return parser.parse_args(arguments)


def _tasks(text: str) -> list[FreeTask]:
    names = text.split(",")
    for name in names:
        if name not in FREE_TASKS:
            known = ", ".join(FREE_TASKS)
            raise argparse.ArgumentTypeError(f"must be a list of {known}, got {name!r}.")
    return [FREE_TASKS[name] for name in names]


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Advance]]:
    """A bar for each pass over the requests."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeLeft())
    # Redrawn as requests end, never in between: they are timed.
    with Progress(*columns, auto_refresh=False) as bar:

        def progress(label: str, total: int) -> Advance:
            task = bar.add_task(label, total=total)
            return lambda: bar.update(task, advance=1, refresh=True)

        yield progress


def _track(
    own: FreeTask,
    folder: Path,
    store: str,
    methods: Methods,
    found: dict[str, Any],
    figure: Path,
) -> None:
    """One run in MLflow for the task, one below it for each method; finished ones stay."""
    tracker = Tracker(folder, name=own.name, params=found["meta"], uri=store, experiment=EXPERIMENT)
    with tracker:
        known = tracker.children()
        for method, outcome in zip(methods.methods, found["outcomes"], strict=True):
            tracker.add_child(
                method.name,
                {"label": method.label, **compute_fields(method.compute)},
                figures(outcome),
                known.get(method.name),
            )
        for file in (folder / "results.json", figure):
            tracker.keep_file(file)


if __name__ == "__main__":
    main()
