"""What exit policies take of the engine's steps, by the clock and by the ledger.

    python -m experiments.policies.profile --prompts gsm8k.jsonl

The engine runs as it does for requests. Around what its policies do, the clock is read: confidence
measures, thresholds, what is learned of rows and of requests. A step's share is their sum over the
step's own time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fathom.commands.prompts import encode_prompt, read_prompts
from fathom.compute import AcceptMode, ComputePolicy, PolicyName
from fathom.config import DEFAULT_MODEL, EngineConfig
from fathom.engine import shallow
from fathom.engine.engine import Engine
from fathom.tuning.overhead import POLICIES
from fathom.types import Request, SamplingParams

_LEARNING = ("threshold_for", "observe", "completed")


class Clock:
    """Seconds that wrapped functions took since the last reading."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds += time.perf_counter() - start

        return timed

    def read(self) -> float:
        """Seconds since the last reading."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def run(
    engine: Engine, prompts: Iterable[tuple[int, ...]], compute: ComputePolicy, new_tokens: int
) -> list[tuple[float, float]]:
    """Answer prompts together; returns seconds of each decode step, and of its policies."""
    for number, prompt in enumerate(prompts):
        engine.add_request(
            Request(
                request_id=f"{number}",
                prompt_token_ids=prompt,
                sampling=SamplingParams(max_tokens=new_tokens),
                compute=compute,
            )
        )
    clock = Clock()
    original = shallow.confidences
    shallow.confidences = clock.wrap(original)  # type: ignore[assignment]
    for name in _LEARNING:
        setattr(engine.policies, name, clock.wrap(getattr(engine.policies, name)))
    steps = []
    try:
        while engine.has_work():
            prefilled = engine.ledger.total.prefill_layer_tokens
            start = time.perf_counter()
            engine.step()
            seconds, policies = time.perf_counter() - start, clock.read()
            if engine.ledger.total.prefill_layer_tokens == prefilled:
                steps.append((seconds, policies))
    finally:
        shallow.confidences = original
        for name in _LEARNING:
            delattr(engine.policies, name)
    return steps


def main() -> None:
    """Print a row for each policy and batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, required=True, help="as for fathom generate")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=4, help="batches, one after the other")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    engine = Engine.from_config(EngineConfig(model=args.model, threads=args.threads))
    prompts = read_prompts(args.prompts)[: args.rounds * max(args.batch)]
    texts = [encode_prompt(engine.tokenizer, prompt) for prompt in prompts]
    table = Table("batch", "policy", "steps", "step (ms)", "policies", "worst 1%", "worst", "head")
    rows = []
    for batch in args.batch:
        for name, policy in POLICIES.items():
            compute = dataclasses.replace(policy, mode=AcceptMode.FREE)
            before = dataclasses.replace(engine.ledger.total)
            steps = []
            for start in range(0, batch * args.rounds, batch):
                steps += run(engine, texts[start : start + batch], compute, args.new_tokens)
            seconds, policies = np.array(steps).T
            shares = 100 * policies / seconds
            row = {
                "batch": batch,
                "policy": PolicyName(name).value,
                "steps": len(steps),
                "step_ms": statistics.median(1e3 * seconds),
                "percent": 100 * policies.sum() / seconds.sum(),
                "worst_1_percent": float(np.percentile(shares, 99)),
                "worst_percent": float(shares.max()),
                "exit_head_percent_of_flops": head_percent(engine, before),
            }
            rows.append(row)
            table.add_row(
                str(batch), row["policy"], str(len(steps)), f"{row['step_ms']:.2f}",
                f"{row['percent']:.2f}%", f"{row['worst_1_percent']:.2f}%",
                f"{row['worst_percent']:.2f}%", f"{row['exit_head_percent_of_flops']:.2f}%",
            )  # fmt: skip
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def head_percent(engine: Engine, before: Any) -> float:
    """The exit head's share of the multiply-adds since a copy of the ledger's total was made."""
    total, costs = engine.ledger.total, engine.ledger.costs
    rows = total.exit_head_rows - before.exit_head_rows
    return 100 * 2 * costs.exit_head_params * rows / (total.flops - before.flops)


if __name__ == "__main__":
    main()
