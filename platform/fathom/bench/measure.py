"""One run: the same prompts, the same number of tokens each, in groups of ``batch`` at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fathom.api.usage import add_compute
from fathom.types import ComputePolicy, ComputeUsage, FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from fathom.engine.engine import Engine

Prompts = Sequence[tuple[int, ...]]


@dataclass(slots=True)
class Run:
    """What one run of one contender gave.

    Attributes:
        seconds: wall-clock, prefill included.
        ttft: seconds to each request's first token, from when its group was handed over.
        tpot: seconds a token after the first, of each request.
        token_ids: of each prompt's answer, in the prompts' order.
        compute: the ledger's sum over all requests; None where there is no ledger.
        flushes: deep passes, each counted once however many sequences it served.
    """

    seconds: float = 0.0
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    compute: ComputeUsage | None = None
    flushes: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers over the wall-clock time."""
        return sum(map(len, self.token_ids)) / self.seconds

    def time_tokens(self, start: float, times: Sequence[float]) -> None:
        """Note when the tokens of one request came, all in seconds of one clock."""
        self.ttft.append(times[0] - start)
        if len(times) > 1:
            self.tpot.append((times[-1] - times[0]) / (len(times) - 1))


class Contender(Protocol):
    """Something that generates; one row of the report for each batch size.

    Attributes:
        engine: ``fathom`` or ``transformers``. mode: its accept mode, or what it does.
    """

    engine: str
    mode: str

    def run(self, prompts: Prompts, batch: int, new_tokens: int) -> Run:
        """Generate exactly ``new_tokens`` tokens for every prompt, greedily."""
        ...


def groups(prompts: Prompts, batch: int) -> Iterator[Prompts]:
    """The prompts in groups of exactly ``batch``; the last one is filled up from the start."""
    for first in range(0, len(prompts), batch):
        group = list(prompts[first : first + batch])
        while len(group) < batch:
            group += prompts[: batch - len(group)]
        yield group


class FathomContender:
    """The engine in one accept mode. Several of them share one engine.

    Args:
        label: how reports name the mode; default: as it is called.
    """

    engine = "fathom"

    def __init__(self, engine: Engine, compute: ComputePolicy, label: str = "") -> None:
        self._engine = engine
        self.compute = compute
        self.mode = label or compute.mode.value

    def run(self, prompts: Prompts, batch: int, new_tokens: int) -> Run:
        """See ``Contender.run``."""
        run = Run()
        pages: list[ComputeUsage] = []
        flushes = self._engine.ledger.total.flushes
        begin = time.perf_counter()
        for group in groups(prompts, batch):
            pages += self._group(group, new_tokens, run)
        run.seconds = time.perf_counter() - begin
        run.compute = add_compute(pages)
        run.flushes = self._engine.ledger.total.flushes - flushes
        return run

    def _group(self, prompts: Prompts, new_tokens: int, run: Run) -> list[ComputeUsage]:
        # Draws of forced exits follow from the seed: each request its own, equal ones in every run.
        first_seed = len(run.token_ids)
        times: list[list[float]] = [[] for _ in prompts]
        ids: list[list[int]] = [[] for _ in prompts]
        pages: list[ComputeUsage] = []
        start = time.perf_counter()
        for index, prompt in enumerate(prompts):
            self._engine.add_request(
                Request(
                    request_id=str(index),
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(
                        max_tokens=new_tokens, ignore_eos=True, seed=first_seed + index
                    ),
                    compute=self.compute,
                )
            )
        while self._engine.has_work():
            for output in self._engine.step():
                index = int(output.request_id)
                ids[index] += [token.id for token in output.tokens]
                times[index] += [time.perf_counter()] * len(output.tokens)
                if output.finish_reason is None:
                    continue
                if output.finish_reason is not FinishReason.LENGTH:
                    raise RuntimeError(f"a request ended early: {output.error}")
                assert output.usage is not None
                pages.append(output.usage.compute)
        for each in times:
            run.time_tokens(start, each)
        run.token_ids += ids
        return pages


def run_interleaved(
    contenders: Sequence[Contender],
    prompts: Prompts,
    batches: Sequence[int],
    *,
    new_tokens: int,
    runs: int,
    num_prompts: int | None = None,
) -> Iterator[tuple[Contender, int, Run]]:
    """Run all contenders in turn, so that a machine's slow minutes meet all of them.

    Run i of every contender and batch size comes before run i + 1 of any. A warm-up of a few
    tokens comes first.

    Args:
        num_prompts: of a run, or as many as the batch if that is more; None takes all.

    Yields:
        contender, batch size and what the run gave.
    """
    for batch in batches:
        for contender in contenders:
            contender.run(prompts[:batch], batch, min(new_tokens, 4))
    for _ in range(runs):
        for batch in batches:
            count = len(prompts) if num_prompts is None else max(batch, num_prompts)
            for contender in contenders:
                yield contender, batch, contender.run(prompts[:count], batch, new_tokens)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the sorted values; None without any.

    Args:
        percent: from 0 to 100.
    """
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Median over rounds of ours / theirs: what slowed a whole round down cancels out."""
    pairs = list(zip(ours, theirs, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None
