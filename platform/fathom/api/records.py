"""What is kept of a stream, so that another server can go on with it: plain values only."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fathom.api.responses import Style
from fathom.types import Request, Resumed, Token, Usage

Endpoint = Literal["chat", "completion"]
StreamKey = tuple[bytes, str]
"""(digest of the API key, request id): nobody can name another one's stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a stream was asked for.

    Attributes:
        key: see ``StreamKey``. body: digest of the request's body.
        requests: for the engine, one a prompt, with their seeds fixed.
        with_usage: whether a last chunk tells the usage.
        started: seconds since the epoch, for what is left of the deadline.
    """

    key: StreamKey
    body: bytes
    endpoint: Endpoint
    style: Style
    requests: tuple[Request, ...]
    with_usage: bool
    started: float


@dataclass(frozen=True, slots=True)
class Progress:
    """What one piece of news brought of one completion; a completion with any was opened.

    Attributes:
        index: of the choice, counted through all prompts.
        characters: of new text. finished: nothing more of it comes.
        scored: the prompt's tokens, where they came with this.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    characters: int = 0
    finished: bool = False
    usage: Usage | None = None
    scored: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class News:
    """A piece of a stream: its events, and where the completions stand after them.

    Attributes:
        events: as they go to the client, with their ids; the first of a stream has id 1.
        ended: nothing comes after this.
    """

    events: tuple[str, ...] = ()
    progress: tuple[Progress, ...] = ()
    ended: bool = False

    @property
    def nbytes(self) -> int:
        """About how much memory this takes."""
        tokens = sum(len(each.token_ids) + len(each.scored) for each in self.progress)
        events = sum(map(sys.getsizeof, self.events))
        return 200 + events + 200 * len(self.progress) + 80 * tokens


@dataclass(slots=True)
class Given:
    """All that one completion has given so far; see ``Progress``."""

    token_ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    characters: int = 0
    finished: bool = False
    usage: Usage | None = None
    scored: tuple[Token, ...] = ()

    def add(self, progress: Progress) -> None:
        """Take in what came next."""
        self.token_ids += progress.token_ids
        self.depths += progress.depths
        self.characters += progress.characters
        self.finished = self.finished or progress.finished
        self.usage = progress.usage or self.usage
        self.scored = progress.scored or self.scored

    @property
    def resumed(self) -> Resumed:
        """As the engine takes it."""
        return Resumed(tuple(self.token_ids), tuple(self.depths), self.finished)


def given_by(news: Iterable[News]) -> dict[int, Given]:
    """Where the completions stand after ``news``, by index; those not opened are missing."""
    given: dict[int, Given] = {}
    for piece in news:
        for progress in piece.progress:
            given.setdefault(progress.index, Given()).add(progress)
    return given


def events_after(news: Iterable[News], number: int) -> list[str]:
    """The events of a whole stream whose ids are above ``number``."""
    return [event for piece in news for event in piece.events][number:]


def rest_of(plan: Plan, given: Mapping[int, Given], epoch: int, now: float) -> list[Request]:
    """The plan's requests as they go on, one a prompt, also where nothing is left to do.

    Args:
        epoch: tells these requests from their orphans, which may still be running somewhere.
        now: seconds since the epoch. The deadline stays what it was.
    """
    return [
        _rest(request, [given.get(prompt * request.n + i) for i in range(request.n)], epoch, left)
        for prompt, request in enumerate(plan.requests)
        for left in [_time_left(request, now - plan.started)]
    ]


def _rest(
    request: Request, given: list[Given | None], epoch: int, timeout_s: float | None
) -> Request:
    sampling = request.sampling
    # Scored once is enough, but a request for scores alone may ask for no tokens.
    if sampling.max_tokens and any(each is not None and each.scored for each in given):
        sampling = dataclasses.replace(sampling, prompt_logprobs=None)
    fresh = all(each is None for each in given)
    return dataclasses.replace(
        request,
        request_id=f"{request.request_id}.{epoch}",
        sampling=sampling,
        timeout_s=timeout_s,
        resumed=() if fresh else tuple(Resumed() if g is None else g.resumed for g in given),
    )


def _time_left(request: Request, elapsed_s: float) -> float | None:
    if request.timeout_s is None:
        return None
    return max(request.timeout_s - elapsed_s, 1e-3)
