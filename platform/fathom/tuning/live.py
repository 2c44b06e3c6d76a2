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

from fathom.evaluation.bootstrap import Interval, interval
from fathom.evaluation.metrics import ratio
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
    tokens_per_s: float
    full_tokens_per_s: float
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
    advance: Callable[[], None] = lambda: None,
) -> LiveFigures:
    """Answer prompts greedily under a setting, and in mode ``full`` in turns with it.

    So the machine's slow minutes meet both. The engine should be new: what its policies have seen
    before changes where they exit.

    Args:
        prompts: token ids; each with its answer and one token more must fit into the context.
        at_once: requests that share the engine.
        advance: called as each request ends: twice a prompt.

    Raises:
        LiveError: for a request that fails in the engine.
    """
    # The first passes of a process are slow, and no mode shall pay for them.
    for policy in (FULL, compute):
        _serve(engine, prompts[:1], policy, 4, 1)
    served: list[Served] = []
    full: list[Served] = []
    seconds = {True: 0.0, False: 0.0}
    size = _BLOCK * at_once
    for place in range(0, len(prompts), size):
        block = prompts[place : place + size]
        for policy, into in ((FULL, full), (compute, served)):
            start = time.perf_counter()
            into += _serve(engine, block, policy, new_tokens, at_once, advance)
            seconds[into is full] += time.perf_counter() - start
    for found in (served, full):
        rescore(engine, prompts, found)
    return _figures(engine, served, full, seconds[False], seconds[True])


def _figures(
    engine: Engine,
    served: Sequence[Served],
    full: Sequence[Served],
    seconds: float,
    full_seconds: float,
) -> LiveFigures:
    saved = 1 - engine.ledger.costs.exit_cost
    tokens = [len(each.token_ids) for each in served]

    def share(values: Iterable[float]) -> Interval:
        return interval(ratio(list(values), tokens))

    def rescored(found: Sequence[Served]) -> Interval:
        return interval(ratio([s.right for s in found], [len(s.token_ids) for s in found]))

    def tpot(found: Sequence[Served]) -> Interval:
        later = [len(s.token_ids) - s.first for s in found]
        return interval(ratio([1e3 * s.seconds for s in found], later))

    return LiveFigures(
        quality=share(len(s.token_ids) - s.wrong for s in served),
        budget=share(len(s.token_ids) - saved * s.compute.exited for s in served),
        exit_rate=share(s.compute.exited for s in served),
        rescored=rescored(served),
        full_rescored=rescored(full),
        tpot_ms=tpot(served),
        full_tpot_ms=tpot(full),
        tokens_per_s=sum(tokens) / seconds,
        full_tokens_per_s=sum(len(s.token_ids) for s in full) / full_seconds,
        requests=len(served),
        tokens=sum(tokens),
    )


def _serve(
    engine: Engine,
    prompts: Sequence[Ids],
    compute: ComputePolicy,
    new_tokens: int,
    at_once: int,
    advance: Callable[[], None] = lambda: None,
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
            advance()
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
