"""What the way of a flush costs: its time outside the deep pass, between two processes."""

from __future__ import annotations

import multiprocessing
import secrets
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

from fathom.bench.measure import FathomContender, Prompts
from fathom.config import EngineConfig
from fathom.dataplane.client import RemoteDeepStage, Timing
from fathom.dataplane.replicas import build_shallow, start_deep
from fathom.engine.engine import Engine
from fathom.types import ComputePolicy

START_S = 300.0
"""Longest that the other process may take to load its half of the model."""


@dataclass(frozen=True, slots=True)
class ExchangeRun:
    """One run's flushes of as many sequences as there were requests.

    Attributes:
        overhead_ms, pass_ms: medians: from a flush's sending to its answer without the pass, and
            the pass. flushes: how many. rows: their median.
    """

    overhead_ms: float
    pass_ms: float
    flushes: int
    rows: float


def measure_exchange(
    config: EngineConfig, compute: ComputePolicy, prompts: Prompts, *, new_tokens: int, runs: int
) -> Iterator[ExchangeRun]:
    """Run the prompts together over a deep stage in a process of its own, again and again.

    Only flushes count that hold all sequences, and no more rows than decoding has: not the
    prompts'. A run without any yields nothing.

    Raises:
        RuntimeError: if the other process does not come up.
        ConfigError, ModelError: see ``build_shallow``.
    """
    token = secrets.token_hex(16)
    with _deep_process(config, token) as address:
        engine = build_shallow(config, lambda: [address], token=token)
        try:
            deep = engine.deep
            assert isinstance(deep, RemoteDeepStage)
            _run(engine, compute, prompts, min(new_tokens, 4))
            for _ in range(runs):
                deep.timings.clear()
                _run(engine, compute, prompts, new_tokens)
                found = summarize(deep.timings, len(prompts), compute.max_stack + 1)
                if found is not None:
                    yield found
        finally:
            engine.close()


def summarize(timings: Sequence[Timing], sequences: int, most_rows: int) -> ExchangeRun | None:
    """The medians over decoding's flushes of all ``sequences``; None without any.

    Args:
        most_rows: that one sequence has in a flush, beside its prompt's.
    """
    own = [
        each
        for each in timings
        if each.sequences == sequences and each.rows <= sequences * most_rows
    ]
    if not own:
        return None
    return ExchangeRun(
        overhead_ms=statistics.median(each.total_s - each.pass_s for each in own) * 1e3,
        pass_ms=statistics.median(each.pass_s for each in own) * 1e3,
        flushes=len(own),
        rows=statistics.median(each.rows for each in own),
    )


def _run(engine: Engine, compute: ComputePolicy, prompts: Prompts, new_tokens: int) -> None:
    FathomContender(engine, compute).run(prompts, len(prompts), new_tokens)


@contextmanager
def _deep_process(config: EngineConfig, token: str) -> Iterator[str]:
    """A process with the deep stage; yields its address, and ends it."""
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(config, token, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen here
    try:
        if not ours.poll(START_S):
            raise RuntimeError(f"the deep stage was not up after {START_S:g} s.")
        try:
            answer = ours.recv()
        except EOFError:
            raise RuntimeError("the deep stage's process ended; see its words above.") from None
        yield answer
    finally:
        ours.close()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(config: EngineConfig, token: str, pipe: Connection) -> None:
    """Serve one shallow replica until the other end of the pipe is closed."""
    host = start_deep(config, leases=1, token=token)
    try:
        pipe.send(host.address)
        pipe.poll(None)
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    finally:
        host.close()
