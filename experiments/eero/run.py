"""EERO against four baselines: accuracy at each budget, on classifiers trained here.

    export FATHOM_DATA=...
    python -m experiments.eero.run --work-dir eero-work --resnet resnet32-d509ac18.th

Trains what ``--work-dir`` does not hold yet (about 40 minutes on one core; it can be interrupted
and goes on), measures, and writes table and figure beside this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.eero import baselines
from experiments.eero.baselines import Floats, Outcome
from experiments.eero.report import write_figure, write_tables
from experiments.eero.speed import Speed, measure
from experiments.eero.tasks import RESNET_HELP, Task, tasks, trained
from fathom.exits.budget import FittedExits, apply, exponential_weights, fit_exits
from fathom.models.classifier_files import Answers, ClassifierFiles

BUDGETS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
SEEDS = (0, 1, 2)
BETAS = tuple(np.geomspace(1e-5, 1, 31).tolist())
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Point:
    """One budget of one classifier and seed.

    Attributes:
        eero: on the test rows, as ``/v1/classify`` serves it: prior and β by accuracy on the
            calibration rows. planned: what it means to spend, at most the budget.
        flops: that it spent on the test rows, as a share of the full model's, the lengths of texts
            considered. beta: that was taken. shares: p, that should leave at each head.
        plain: EERO with the uniform prior and the largest β for which the budget binds.
        others: baselines by name; None where the budget allows nothing.
    """

    budget: float
    planned: float
    eero: Outcome
    flops: float
    beta: float
    shares: list[float]
    plain: Outcome
    others: dict[str, Outcome | None]


@dataclass(frozen=True, slots=True)
class Result:
    """One classifier and seed.

    Attributes:
        costs: B_m, as shares. accuracy: of each head on the test rows. overthought: share of the
            test rows that a head has right and the last one wrong. rows: of calibration and of
            test.
    """

    task: str
    title: str
    seed: int
    costs: list[float]
    accuracy: list[float]
    overthought: list[float]
    rows: tuple[int, int]
    points: list[Point]


def evaluate(name: str, task: Task, files: ClassifierFiles, seed: int) -> Result:
    """Split the held-out rows in halves at random, set up on one, measure on the other."""
    held = files.calibration
    order = np.random.default_rng(seed).permutation(len(held.labels))
    half = len(order) // 2
    calibration, test = held.take(order[:half]), held.take(order[half:])
    model = files.model
    full = model.cumulative_flops(calibration.sizes).mean(axis=0)
    costs: Floats = full / full[-1]
    alone: Floats = model.static_flops(calibration.sizes).mean(axis=0) / full[-1]
    spent = model.cumulative_flops(test.sizes)
    points = []
    for budget in BUDGETS:
        fitted = fit_exits(calibration.confidence, calibration.correct, costs, budget, spend=True)
        exits = apply(test.confidence, fitted.thresholds)
        flops = spent[np.arange(len(exits)), exits].sum() / spent[:, -1].sum()
        shares = np.asarray(fitted.shares)
        plain = fit_plain(calibration, costs, budget)
        points.append(
            Point(
                budget,
                fitted.cost,
                baselines.outcome(test, exits, costs),
                float(flops),
                fitted.beta,
                shares.tolist(),
                baselines.outcome(test, apply(test.confidence, plain.thresholds), costs),
                {
                    "static": baselines.static(calibration, test, alone, budget),
                    "global": baselines.one_threshold(calibration, test, costs, budget),
                    "msdnet": baselines.msdnet(calibration, test, costs, budget),
                    "random": baselines.at_random(test, shares, costs),
                },
            )
        )
    return Result(
        name,
        task.title,
        seed,
        costs.tolist(),
        test.correct.mean(axis=0).tolist(),
        (test.correct & ~test.correct[:, -1:]).mean(axis=0).tolist(),
        (half, len(order) - half),
        points,
    )


def fit_plain(calibration: Answers, costs: Floats, budget: float) -> FittedExits:
    """Uniform prior, and the largest β for which the budget binds (the smallest if none does)."""
    risks = 1 - calibration.correct.mean(axis=0)
    binding = [
        beta
        for beta in BETAS
        if exponential_weights(risks, costs, budget, beta) @ costs >= 0.999 * budget
    ]
    beta = max(binding, default=min(BETAS))
    return fit_exits(calibration.confidence, calibration.correct, costs, budget, beta=beta)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--resnet", type=Path, metavar="FILE", help=RESNET_HELP)
    parser.add_argument("--only", default="", metavar="LIST", help="names of tasks")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="default: here")
    args = parser.parse_args(arguments)
    known = tasks(args.resnet)
    chosen = args.only.split(",") if args.only else list(known)
    for name in chosen:
        if name not in known:
            raise SystemExit(f"--only {name}: tasks are {', '.join(known)}. {RESNET_HELP}")
    torch.set_num_threads(args.threads)
    results = [
        evaluate(name, known[name], trained(known[name], seed, args.work_dir), seed)
        for name in chosen
        for seed in SEEDS
    ]
    speeds = {
        known[name].title: measure(known[name], trained(known[name], SEEDS[0], args.work_dir))
        for name in chosen
    }
    write_json(args.work_dir / "results.json", results, speeds)
    write_tables(args.out / "README.md", results, speeds)
    write_figure(args.out / "accuracy.png", results)


def write_json(
    file: Path, results: Sequence[Result], speeds: Mapping[str, Sequence[Speed]]
) -> None:
    """Everything that was measured."""
    body: dict[str, Any] = {
        "budgets": BUDGETS,
        "results": [asdict(result) for result in results],
        "speed": {title: [asdict(speed) for speed in found] for title, found in speeds.items()},
    }
    file.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
