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
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from fathom.tuning.live_figures import (
    FULL,
    Ids,
    LiveFigures,
    Served,
    figures_of,
    take_turns,
)
from fathom.types import ComputePolicy, FinishReason, Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from fathom.engine.engine import Engine


class LiveError(RuntimeError):
    """A request that failed live."""


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

    def answer(some: Sequence[Ids], policy: ComputePolicy, tokens: int) -> list[Served]:
        return _serve(engine, some, policy, tokens, at_once)

    runs = take_turns(
        answer, prompts, compute, new_tokens=new_tokens, at_once=at_once, beside_full=beside_full
    )
    if beside_full:
        for run in runs:
            rescore(engine, prompts, run.served)
    return figures_of(runs, engine.ledger.costs.exit_cost, rescored=beside_full)


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
        if output.tokens and not own.tokens:
            own.first, began[place] = len(output.tokens), now
        own.tokens += len(output.tokens)
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
