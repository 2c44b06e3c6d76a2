"""A study's prompts through a server's HTTP, so many at a time: what its clients would see."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from fathom.drills.client import StreamClient
from fathom.drills.load import run_load
from fathom.drills.transcript import Transcript
from fathom.tuning.live import LiveError
from fathom.tuning.live_figures import Ids, LiveFigures, Served, figures_of, take_turns
from fathom.tuning.operating_points import compute_fields
from fathom.types import ComputePolicy, ComputeUsage

COMPLETIONS = "/v1/completions"


def run_served(
    client: StreamClient,
    prompts: Sequence[Ids],
    compute: ComputePolicy,
    *,
    model: str,
    prefix: str,
    exit_cost: float,
    new_tokens: int,
    at_once: int,
    beside_full: bool,
) -> LiveFigures:
    """Answer prompts greedily under a policy; the next is sent as soon as one has ended.

    A token's quality is what the server's ledger says of it (``usage.compute``). Prompts are
    computed anew in each mode: prefixes are shared within one alone.

    Args:
        model: the name that the server has for it. prefix: of its paths, empty or ``/some``.
        exit_cost: of a token decided at the exit, as a share of a full one's.
        at_once: requests under way. beside_full: see ``live_figures.take_turns``.

    Raises:
        LiveError: for a request that fails.
    """
    run = secrets.token_hex(4)

    def answer(some: Sequence[Ids], policy: ComputePolicy, tokens: int) -> list[Served]:
        salt = f"{run}-{policy.mode}-{tokens}"
        bodies = [_body(model, ids, policy, tokens, salt) for ids in some]
        found = run_load(
            client,
            bodies,
            concurrency=at_once,
            name=f"{salt}-{secrets.token_hex(4)}",
            path=f"{prefix}{COMPLETIONS}",
        )
        return [_served(found[index]) for index in range(len(some))]

    # As many as are ever under way, so that every replica has run once.
    runs = take_turns(
        answer, prompts, compute, new_tokens=new_tokens, at_once=at_once,
        beside_full=beside_full, warm_up=at_once,
    )  # fmt: skip
    return figures_of(runs, exit_cost, rescored=False)


def _body(
    model: str, prompt: Ids, compute: ComputePolicy, tokens: int, salt: str
) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "seed": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": salt,
        "compute": compute_fields(compute),
        "depths": True,
    }


def _served(found: Transcript) -> Served:
    """One answer.

    Raises:
        LiveError: if there is none.
    """
    if found.failed or found.first_s is None or "compute" not in found.usage:
        raise LiveError(f"a request failed live: {found.error or 'it has no tokens, or no usage'}")
    known = ComputeUsage.__dataclass_fields__
    page = {name: value for name, value in found.usage["compute"].items() if name in known}
    return Served(
        compute=ComputeUsage(**page),
        first=found.first_tokens,
        seconds=found.last_s - found.first_s,
        tokens=found.usage["completion_tokens"],
    )
