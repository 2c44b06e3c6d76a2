"""Prompts of a study's live runs, beside the rows that its traces have of the same requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fathom.settings import ConfigError
from fathom.tuning.live_figures import Ids
from fathom.tuning.rows import Integers, TraceRows
from fathom.tuning.study import Study

Pair = tuple[TraceRows, TraceRows]


@dataclass(frozen=True, slots=True, eq=False)
class LivePart:
    """Requests of one trace that run live.

    Attributes:
        prompts: token ids of each.
        first: rows that a budget's first λ comes from. rows: those of these requests, of their
            first ``live.new_tokens`` tokens: on them a replay foretells what runs live.
    """

    prompts: list[Ids]
    first: TraceRows
    rows: TraceRows

    @property
    def pair(self) -> Pair:
        """What ``objective.evaluate`` takes."""
        return self.first, self.rows


def live_parts(
    study: Study, files: Sequence[Sequence[Ids]], parts: Sequence[Pair]
) -> list[LivePart]:
    """The first ``live.requests`` requests of each pair's second rows, as prompts.

    Args:
        files: the prompts of each file of ``live.prompts``, as token ids.
        parts: see ``objective.evaluate``, in the order of the traces, exit by exit.

    Raises:
        ConfigError: for prompts that are not those that a trace was recorded from.
    """
    names = study.live.prompts
    return [
        _part(study, names[place % len(names)], files[place % len(files)], first, rows)
        for place, (first, rows) in enumerate(parts)
    ]


def _part(
    study: Study, file: str, prompts: Sequence[Ids], first: TraceRows, rows: TraceRows
) -> LivePart:
    own, starts = first_positions(rows)
    start = dict(zip(own.tolist(), starts.tolist(), strict=True))
    # `fathom generate --prompts` numbers requests by lines. In their order, whatever came first.
    lines = {int(name): group for group in start if (name := rows.requests[group]).isdecimal()}
    taken = sorted(lines)[: study.live.requests]
    if len(taken) < 2:
        raise ConfigError(
            f"live.prompts: {rows.name} was not recorded from a file of prompts: its requests have "
            "no numbers. Record it by `fathom generate --prompts FILE --trace`."
        )
    for line in taken:
        length = start[lines[line]] + 1
        # In mode exact the first token is decided without the exit head.
        if line >= len(prompts) or len(prompts[line]) not in (length, length - 1):
            what = f"{len(prompts[line])} tokens" if line < len(prompts) else "no such prompt"
            raise ConfigError(
                f"live.prompts: {file}: prompt {line + 1} has {length} tokens in {rows.name}, and "
                f"{what} here: name the prompts that it was recorded from."
            )
    inside = rows.select(np.isin(rows.groups, [lines[line] for line in taken]))
    return LivePart(
        [prompts[line] for line in taken], first, first_tokens(inside, study.live.new_tokens)
    )


def first_positions(rows: TraceRows) -> tuple[Integers, Integers]:
    """Each request's number, and the position of its first row: [g], [g]."""
    order = np.lexsort((rows.position, rows.groups))
    groups, places = np.unique(rows.groups[order], return_index=True)
    return groups, rows.position[order][places]


def first_tokens(rows: TraceRows, count: int) -> TraceRows:
    """The rows of each request's first ``count`` positions, from its first row on."""
    groups, starts = first_positions(rows)
    return rows.select(rows.position - starts[np.searchsorted(groups, rows.groups)] < count)
