"""Settings run through the engine itself: what a replay on a trace foretells, measured.

A replay and a live run count the same thing: the share of the output's tokens that the full model
would have chosen *in the output's own context*. They differ in the contexts. A trace was recorded
along the full model's text, so in mode ``free`` its rows lie behind right tokens alone; live, the
rows behind a wrong draft stand in a text that the full model would not have written, and the exit
head may be surer or less sure there. That drift is the replay's error. Mode ``exact`` has none.

No second model is needed to judge live tokens. In ``free`` and ``exact`` every row of the output
goes through the deep layers too, draft or not, with all tokens before it as they stand: a flush is
the full model, teacher-forced on the live output, and its verdicts are in the ledger. ``rescored``
checks the engine's word: the finished text goes through the full model once more, in one pass, and
each token is compared with the best logit at its place. One pass and many small ones round
differently, so in a narrow dtype near-ties fall out otherwise now and then. Mode ``full`` has this
too, and its share is what ``rescored`` is to be held against.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from fathom.evaluation.bootstrap import Interval, interval
from fathom.evaluation.metrics import Statistic, ratio
from fathom.tuning.rows import Floats
from fathom.types import (
    AcceptMode,
    ComputePolicy,
    ComputeUsage,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
)

if TYPE_CHECKING:
    from fathom.engine.engine import Engine

Ids = tuple[int, ...]

NOTHING = Interval(None, None, None)
FULL = ComputePolicy(mode=AcceptMode.FULL)

_BLOCK = 4
"""Requests a place of the batch, between two turns of mode ``full``."""


class LiveError(RuntimeError):
    """A request that failed in the engine."""


@dataclass(slots=True)
class Served:
    """One request that was answered live.

    Attributes:
        compute: its page of the ledger. right: tokens that are the best of one full pass over the
            finished text; see ``rescored``.
        first, seconds: tokens of the first output, and seconds from it to the last.
    """

    token_ids: list[int] = field(default_factory=list)
    compute: ComputeUsage = field(default_factory=ComputeUsage)
    right: int = 0
    first: int = 0
    seconds: float = 0.0

    @property
    def wrong(self) -> int:
        """Tokens that the deep stage would have chosen otherwise; it has seen all that stand.

        In mode ``exact`` what it did not agree with is no part of the output.
        """
        own = self.compute
        return own.verified - own.accepted if own.mode == AcceptMode.FREE else 0


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


def run_live(
    engine: Engine,
    prompts: Sequence[Ids],
    compute: ComputePolicy,
    *,
    new_tokens: int,
    at_once: int = 1,
    beside_full: bool = True,
) -> LiveFigures:
    """Answer prompts greedily under a setting.

    The engine should be new: what its policies have seen before changes where they exit.

    Args:
        prompts: token ids; each with its answer and one token more must fit into the context.
        at_once: requests that share the engine.
        beside_full: answer them in mode ``full`` too, in turns with the setting, so that the
            machine's slow minutes meet both, and check the engine's word by ``rescore``. Else the
            figures of ``full`` are None, and ``rescored`` too.

    Raises:
        LiveError: for a request that fails in the engine.
    """
    # The first passes of a process are slow, and no mode shall pay for them.
    runs = [_Run(FULL), _Run(compute)] if beside_full else [_Run(compute)]
    for run in runs:
        _serve(engine, prompts[:1], run.compute, 4, 1)
    size = _BLOCK * at_once if beside_full else len(prompts)
    for place in range(0, len(prompts), size):
        block = prompts[place : place + size]
        for run in runs:
            start = time.perf_counter()
            run.served += _serve(engine, block, run.compute, new_tokens, at_once)
            run.seconds += time.perf_counter() - start
    if beside_full:
        for run in runs:
            rescore(engine, prompts, run.served)
    return _figures(engine, runs[-1], runs[0] if beside_full else None)


@dataclass(slots=True)
class _Run:
    """One policy's answers, and the seconds that they took."""

    compute: ComputePolicy
    served: list[Served] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return sum(len(each.token_ids) for each in self.served) / max(self.seconds, 1e-9)

    @property
    def paces(self) -> Floats:
        """[requests, 2]: milliseconds after the first output, and tokens in them."""
        return np.array([(1e3 * s.seconds, len(s.token_ids) - s.first) for s in self.served])


def _figures(engine: Engine, run: _Run, full: _Run | None) -> LiveFigures:
    served = run.served
    saved = 1 - engine.ledger.costs.exit_cost
    tokens = [len(each.token_ids) for each in served]

    def share(values: Iterable[float]) -> Interval:
        return interval(ratio(list(values), tokens))

    return LiveFigures(
        quality=share(len(s.token_ids) - s.wrong for s in served),
        budget=share(len(s.token_ids) - saved * s.compute.exited for s in served),
        exit_rate=share(s.compute.exited for s in served),
        rescored=_rescored(run) if full else NOTHING,
        full_rescored=_rescored(full) if full else NOTHING,
        tpot_ms=_tpot(run),
        full_tpot_ms=_tpot(full) if full else NOTHING,
        speedup=_speedup(run, full) if full else NOTHING,
        tokens_per_s=run.tokens_per_s,
        full_tokens_per_s=full.tokens_per_s if full else None,
        requests=len(served),
        tokens=sum(tokens),
    )


def _rescored(run: _Run) -> Interval:
    return interval(ratio([s.right for s in run.served], [len(s.token_ids) for s in run.served]))


def _tpot(run: _Run) -> Interval:
    seconds, tokens = run.paces.T.tolist()
    return interval(ratio(seconds, tokens))


def _speedup(run: _Run, full: _Run) -> Interval:
    def combine(sums: Floats) -> Floats:
        return np.asarray(sums[:, 0] / sums[:, 1] / (sums[:, 2] / sums[:, 3]))

    return interval(Statistic(np.hstack([full.paces, run.paces]), combine))


def _serve(
    engine: Engine,
    prompts: Sequence[Ids],
    compute: ComputePolicy,
    new_tokens: int,
    at_once: int,
) -> list[Served]:
    """Answer prompts, the next as soon as one of ``at_once`` has ended."""
    found = [Served() for _ in prompts]
    began = [0.0] * len(prompts)
    params = SamplingParams(max_tokens=new_tokens, seed=0)
    waiting = iter(enumerate(prompts))

    def send(count: int) -> None:
        for place, ids in islice(waiting, count):
            engine.add_request(
                Request(request_id=str(place), prompt_token_ids=ids, sampling=params,
                        compute=compute)
            )  # fmt: skip

    def take(output: RequestOutput) -> None:
        place = int(output.request_id)
        own, now = found[place], time.perf_counter()
        if output.tokens and not own.token_ids:
            own.first, began[place] = len(output.tokens), now
        own.token_ids += [token.id for token in output.tokens]
        if output.usage is not None:
            own.compute = output.usage.compute
        if output.finish_reason is not None:
            own.seconds = now - began[place]
            send(1)

    send(at_once)
    _drain(engine, take)
    return found


def rescore(engine: Engine, prompts: Sequence[Ids], served: Sequence[Served]) -> None:
    """Count the tokens that are the full model's by one pass over each finished text.

    A token is right where no other has a larger logit: ties are the model's choice as well.
    """
    params = SamplingParams(prompt_logprobs=1, max_tokens=0)

    def take(output: RequestOutput) -> None:
        if output.prompt_tokens is None:
            return
        place = int(output.request_id)
        for token in output.prompt_tokens[len(prompts[place]) :]:
            assert token.logprob is not None
            assert token.top_logprobs is not None
            served[place].right += token.logprob >= max(token.top_logprobs.values())

    for place, (ids, own) in enumerate(zip(prompts, served, strict=True)):
        own.right = 0
        text = ids + tuple(own.token_ids)
        engine.add_request(
            Request(request_id=str(place), prompt_token_ids=text, sampling=params, compute=FULL)
        )
    _drain(engine, take)


def _drain(engine: Engine, take: Callable[[RequestOutput], None]) -> None:
    while engine.has_work():
        for output in engine.step():
            if output.finish_reason is FinishReason.ERROR:
                raise LiveError(f"a request failed live: {output.error}")
            take(output)
