"""Figures of requests that were answered live, whoever answered them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fathom.evaluation.bootstrap import Interval, interval
from fathom.evaluation.metrics import Statistic, ratio
from fathom.tuning.rows import Floats
from fathom.types import AcceptMode, ComputePolicy, ComputeUsage

Ids = tuple[int, ...]

NOTHING = Interval(None, None, None)
FULL = ComputePolicy(mode=AcceptMode.FULL)

_BLOCK = 4
"""Requests a place of the batch, between two turns of mode ``full``."""


@dataclass(slots=True)
class Served:
    """One request that was answered live.

    Attributes:
        token_ids: of the answer, where they are known. tokens: their number.
        compute: its page of the ledger. right: tokens that are the best of one full pass over the
            finished text; see ``live.rescore``.
        first, seconds: tokens of the first output, and seconds from it to the last.
    """

    token_ids: list[int] = field(default_factory=list)
    compute: ComputeUsage = field(default_factory=ComputeUsage)
    right: int = 0
    first: int = 0
    seconds: float = 0.0
    tokens: int = 0

    @property
    def wrong(self) -> int:
        """Tokens that the deep stage would have chosen otherwise; it has seen all that stand.

        In mode ``exact`` what it did not agree with is no part of the output.
        """
        own = self.compute
        return own.verified - own.accepted if own.mode == AcceptMode.FREE else 0


Answers = Callable[[Sequence[Ids], ComputePolicy, int], list[Served]]
"""Answers prompts greedily under a policy, with so many tokens at most, in their order."""


@dataclass(frozen=True, slots=True)
class LiveFigures:
    """What a setting gave live, each with its 95% bootstrap interval over requests.

    Attributes:
        quality, budget, exit_rate: as in ``fathom.tuning.objective.Figures``.
        rescored: ``quality`` by one more full pass; full_rescored: that of mode ``full``.
        tpot_ms: milliseconds a token after the first output, of a request that shares the engine
            with the others. full_tpot_ms: of mode ``full``, in turns with it.
        speedup: the latter over the former, of the same requests.
        tokens_per_s: of all requests together, prompts included. full_tokens_per_s: of ``full``.
        requests, tokens: that were answered.
    """

    quality: Interval
    budget: Interval
    exit_rate: Interval
    rescored: Interval
    full_rescored: Interval
    tpot_ms: Interval
    full_tpot_ms: Interval
    speedup: Interval
    tokens_per_s: float
    full_tokens_per_s: float | None
    requests: int
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> LiveFigures:
        """From ``as_dict``."""
        values: dict[str, Any] = {
            name: Interval(**value) if isinstance(value, dict) else value
            for name, value in body.items()
        }
        return cls(**values)


def take_turns(
    answer: Answers,
    prompts: Sequence[Ids],
    compute: ComputePolicy,
    *,
    new_tokens: int,
    at_once: int,
    beside_full: bool,
    warm_up: int = 1,
) -> list[Run]:
    """Answer prompts under a policy, in turns with mode ``full`` if that is wanted; see
    ``run_live``.

    Args:
        warm_up: prompts that are answered by a few tokens before.

    Returns:
        the run of ``full``, where there is one, and that of the policy.
    """
    # The first passes of a process are slow, and no mode shall pay for them.
    runs = [Run(FULL), Run(compute)] if beside_full else [Run(compute)]
    for run in runs:
        answer(prompts[:warm_up], run.compute, 4)
    size = _BLOCK * at_once if beside_full else len(prompts)
    for place in range(0, len(prompts), size):
        block = prompts[place : place + size]
        for run in runs:
            start = time.perf_counter()
            run.served += answer(block, run.compute, new_tokens)
            run.seconds += time.perf_counter() - start
    return runs


@dataclass(slots=True)
class Run:
    """One policy's answers, and the seconds that they took."""

    compute: ComputePolicy
    served: list[Served] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return sum(each.tokens for each in self.served) / max(self.seconds, 1e-9)

    @property
    def paces(self) -> Floats:
        """[requests, 2]: milliseconds after the first output, and tokens in them."""
        return np.array([(1e3 * s.seconds, s.tokens - s.first) for s in self.served])


def figures_of(runs: Sequence[Run], exit_cost: float, *, rescored: bool) -> LiveFigures:
    """Figures of what ``take_turns`` gave.

    Args:
        exit_cost: of a token decided at the exit, as a share of a full one's.
        rescored: whether the answers went through ``rescore``.
    """
    run, full = runs[-1], runs[0] if len(runs) > 1 else None
    served = run.served
    saved = 1 - exit_cost
    tokens = [each.tokens for each in served]

    def share(values: Iterable[float]) -> Interval:
        return interval(ratio(list(values), tokens))

    return LiveFigures(
        quality=share(s.tokens - s.wrong for s in served),
        budget=share(s.tokens - saved * s.compute.exited for s in served),
        exit_rate=share(s.compute.exited for s in served),
        rescored=_rescored(run) if rescored else NOTHING,
        full_rescored=_rescored(full) if rescored and full else NOTHING,
        tpot_ms=_tpot(run),
        full_tpot_ms=_tpot(full) if full else NOTHING,
        speedup=_speedup(run, full) if full else NOTHING,
        tokens_per_s=run.tokens_per_s,
        full_tokens_per_s=full.tokens_per_s if full else None,
        requests=len(served),
        tokens=sum(tokens),
    )


def _rescored(run: Run) -> Interval:
    return interval(ratio([s.right for s in run.served], [s.tokens for s in run.served]))


def _tpot(run: Run) -> Interval:
    seconds, tokens = run.paces.T.tolist()
    return interval(ratio(seconds, tokens))


def _speedup(run: Run, full: Run) -> Interval:
    def combine(sums: Floats) -> Floats:
        return np.asarray(sums[:, 0] / sums[:, 1] / (sums[:, 2] / sums[:, 3]))

    return interval(Statistic(np.hstack([full.paces, run.paces]), combine))
