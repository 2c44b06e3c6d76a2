"""What a shared prefix saves: TTFT on a replica that did not compute it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fathom.bench.throughput import BenchError
from fathom.engine.engine import Engine
from fathom.types import FinishReason, Request, SamplingParams

PUBLISHED_S = 60.0
"""Longest that blocks may take into the store."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """A request's first token, and the seconds until it came."""

    token_id: int
    seconds: float


class Asked(Protocol):
    """A replica that can be asked directly."""

    def first_token(self, prompt: Sequence[int]) -> FirstToken:
        """Run a prompt alone."""
        ...


@dataclass(frozen=True, slots=True)
class PrefixRun:
    """TTFT of one prompt, computed, and with its blocks from the store."""

    cold_s: float
    warm_s: float

    @property
    def ratio(self) -> float:
        """Warm over cold."""
        return self.warm_s / self.cold_s


def first_token(engine: Engine, prompt: Sequence[int], request_id: str = "prefix") -> FirstToken:
    """Run a prompt alone on an engine; the request has ended when this returns.

    Raises:
        BenchError: if it fails.
    """
    engine.add_request(
        Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=2, ignore_eos=True),
        )
    )
    start = time.perf_counter()
    found: FirstToken | None = None
    while engine.has_work():
        for output in engine.step():
            if output.tokens and found is None:
                found = FirstToken(output.tokens[0].id, time.perf_counter() - start)
            if output.finish_reason not in (None, FinishReason.LENGTH):
                raise BenchError(f"a request ended early: {output.error}")
    assert found is not None
    return found


def measure_prefix(
    replicas: tuple[Asked, Asked],
    blocks: Callable[[], int],
    *,
    prefix_tokens: int,
    vocab_size: int,
    runs: int,
) -> Iterator[PrefixRun]:
    """Compute a prompt on one replica, then ask the other for the same; in turn.

    Each run has a prompt of its own, of random tokens: prefill does not care what they say. The
    prompt is the prefix and one token more, since the last one is always computed.

    Args:
        blocks: how many the shared store lists.

    Raises:
        BenchError: if the blocks do not come into the store, or the two first tokens differ.
    """
    for run in range(-1, runs):  # the first one warms up
        numbers = random.Random(f"prefix {run}")
        prompt = [numbers.randrange(vocab_size) for _ in range(prefix_tokens + 1)]
        one, other = replicas if run % 2 else replicas[::-1]
        before = blocks()
        cold = one.first_token(prompt)
        _await_blocks(blocks, before)
        warm = other.first_token(prompt)
        if cold.token_id != warm.token_id:
            raise BenchError(
                f"run {run}: the first token is {warm.token_id} with blocks from the store, "
                f"{cold.token_id} without."
            )
        if run >= 0:
            yield PrefixRun(cold.seconds, warm.seconds)


def _await_blocks(blocks: Callable[[], int], before: int) -> None:
    """Wait until the store has new blocks, and no more come."""
    deadline = time.monotonic() + PUBLISHED_S
    latest, since = before, time.monotonic()
    while latest == before or time.monotonic() - since < 1.0:
        if time.monotonic() > deadline:
            raise BenchError(f"no block came into the store in {PUBLISHED_S:g} s.")
        time.sleep(0.1)
        now = blocks()
        if now != latest:
            latest, since = now, time.monotonic()
