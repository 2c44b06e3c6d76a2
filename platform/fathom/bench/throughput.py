"""Tokens/s of servers, over HTTP, one loaded at a time."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fathom.bench.measure import percentile
from fathom.bench.prompts import QUESTIONS
from fathom.drills.client import StreamClient
from fathom.drills.load import run_load


class BenchError(RuntimeError):
    """A server that does not give what a measurement asks for."""


@dataclass(frozen=True, slots=True)
class ServerRun:
    """One run against one server. ttft_ms_p50: to the first token, over all requests."""

    tokens_per_s: float
    ttft_ms_p50: float | None


def bodies_of(model: str, mode: str, requests: int, new_tokens: int, salt: str) -> list[Any]:
    """Chat completions of exactly ``new_tokens`` tokens each.

    Args:
        salt: keeps the prefix caches of runs apart: each run prefills all of its prompts.
    """
    return [
        {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "cache_salt": salt,
            "compute": {"mode": mode},
        }
        for question in itertools.islice(itertools.cycle(QUESTIONS), requests)
    ]


def run_once(client: StreamClient, bodies: Sequence[Any], concurrency: int, name: str) -> ServerRun:
    """Run all requests.

    Raises:
        BenchError: if one fails, or does not have all of its tokens.
    """
    start = time.perf_counter()
    found = run_load(client, bodies, concurrency=concurrency, name=name)
    seconds = time.perf_counter() - start
    tokens = 0
    for index, each in found.items():
        if each.failed:
            raise BenchError(f"request {index} failed: {each.error or 'no end'}")
        tokens += each.usage["completion_tokens"]
    wanted = sum(body["max_tokens"] for body in bodies)
    if tokens != wanted:
        raise BenchError(f"the answers have {tokens} tokens, {wanted} were asked for.")
    first = [each.first_s for each in found.values() if each.first_s is not None]
    ttft = percentile(first, 50)
    return ServerRun(tokens / seconds, None if ttft is None else ttft * 1e3)


def measure_servers(
    servers: Mapping[str, StreamClient],
    *,
    model: str,
    modes: Sequence[str],
    requests: int,
    concurrency: int,
    new_tokens: int,
    runs: int,
) -> Iterator[tuple[str, str, ServerRun]]:
    """Load the servers in turn: run i of all modes and servers before run i + 1 of any.

    A warm-up of a few tokens comes first, and is not told.

    Yields:
        the server's name, the mode, and what the run gave.

    Raises:
        BenchError: see ``run_once``.
    """
    for run, mode, (name, client) in itertools.product(range(-1, runs), modes, servers.items()):
        tokens = min(new_tokens, 4) if run < 0 else new_tokens
        label = f"bench-{mode}-{run}"
        bodies = bodies_of(model, mode, requests, tokens, label)
        found = run_once(client, bodies, concurrency, f"{label}-{name}")
        if run >= 0:
            yield name, mode, found
