"""The ``usage`` object: token counts, and the ledger's figures as ``usage.compute``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from fathom.types import ComputeUsage, Usage

_OF_THE_POLICY = frozenset({"mode", "requested_budget", "operating_point"})
"""Fields of a page that say what was asked for: nothing to add up."""


def usage_body(usages: Mapping[tuple[int, int], Usage]) -> dict[str, Any]:
    """Add up the usages of a request's completions.

    Args:
        usages: (prompt, completion of that prompt) -> usage. A prompt counts once however many
            completions it has; its cached tokens are those of its first completion, for the
            others share the first one's blocks.
    """
    first: dict[int, Usage] = {}
    for (prompt, _), usage in sorted(usages.items()):
        first.setdefault(prompt, usage)
    prompt_tokens = sum(usage.prompt_tokens for usage in first.values())
    completion_tokens = sum(usage.completion_tokens for usage in usages.values())
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in first.values())},
        "compute": compute_body(add_compute(usage.compute for usage in usages.values())),
    }


def add_compute(pages: Iterable[ComputeUsage]) -> ComputeUsage:
    """The sum of several pages of the ledger, all of one compute policy."""
    total = ComputeUsage()
    realised = 0.0
    for page in pages:
        for field in dataclasses.fields(ComputeUsage):
            if field.name in _OF_THE_POLICY:
                setattr(total, field.name, getattr(total, field.name) or getattr(page, field.name))
            elif field.name != "realised_budget":
                value = getattr(total, field.name) + getattr(page, field.name)
                setattr(total, field.name, value)
        realised += page.decided * (page.realised_budget or 0.0)
    total.realised_budget = realised / total.decided if total.decided else None
    return total


def compute_body(compute: ComputeUsage) -> dict[str, Any]:
    """A page of the ledger with its ratios: layers a token, rates from 0 to 1 (None if unknown)."""
    body = dataclasses.asdict(compute)
    body["layers_per_token"] = compute.layers_per_token
    body["mean_depth"] = compute.mean_depth
    body["exit_rate"] = compute.exit_rate
    body["acceptance_rate"] = compute.acceptance_rate
    return body
