"""What one streamed answer came to, and how it differs from what it should have been."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fathom.drills.events import DONE, Event


@dataclass(slots=True)
class Completion:
    """One completion of an answer, as it was put together from its chunks.

    Attributes:
        tokens: each token's text, where the request asked for ``logprobs``.
        num_tokens: counted by their depths, where the request asked for ``depths``.
        finish_reason: empty until it has ended.
    """

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str = ""

    def add(self, choice: dict[str, Any]) -> None:
        """Take one entry of a chunk's ``choices``, of either endpoint."""
        self.text += (choice.get("delta") or {}).get("content") or choice.get("text") or ""
        logprobs = choice.get("logprobs") or {}
        self.tokens += [entry["token"] for entry in logprobs.get("content") or ()]
        self.tokens += logprobs.get("tokens") or ()
        self.num_tokens += len(choice.get("depths") or ())
        self.finish_reason = choice.get("finish_reason") or self.finish_reason


@dataclass(slots=True)
class Transcript:
    """One request's events, over however many connections they came.

    Attributes:
        completions: by their index. last_id: the id of the last event; None before the first.
        jumps: events whose id left out at least one number after the id before it.
        repeats: events whose id was not above the id before it.
        error: why the request failed; empty if it did not. done: the stream came to its end.
        breaks: when and how a connection ended before its stream, or brought none.
        reconnects: requests that were sent again. resumptions: those of them that went on after
            an event that was seen, and brought another.
        usage: the server's, where it was asked for. first_s, last_s: seconds to the first and the
            last event that brought a token. seconds: to the end. first_tokens: tokens of the first,
            where the request asked for ``depths``.
    """

    completions: dict[int, Completion] = field(default_factory=dict)
    last_id: int | None = None
    jumps: int = 0
    repeats: int = 0
    error: str = ""
    done: bool = False
    breaks: list[str] = field(default_factory=list)
    reconnects: int = 0
    resumptions: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    first_s: float | None = None
    first_tokens: int = 0
    last_s: float = 0.0
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the client did not get an answer."""
        return bool(self.error) or not self.done

    def add(self, event: Event) -> bool:
        """Take an event; returns whether it brought news of a token.

        Nothing is dropped or put right: what a client does that trusts its server.
        """
        self._number(event.id)
        if event.data == DONE:
            self.done = True
            return False
        try:
            body = json.loads(event.data)
        except json.JSONDecodeError:
            self.error = f"no JSON in an event: {event.data[:80]!r}"
            return False
        if "error" in body:
            self.error = str(body["error"].get("message", body["error"]))
            return False
        self.usage = body.get("usage") or self.usage
        before = self._size()
        for choice in body.get("choices", ()):
            self.completions.setdefault(choice["index"], Completion()).add(choice)
        return self._size() > before

    @property
    def num_tokens(self) -> int:
        """Of all completions, where the request asked for ``depths``."""
        return sum(each.num_tokens for each in self.completions.values())

    def _size(self) -> int:
        return sum(len(each.text) + each.num_tokens for each in self.completions.values())

    def _number(self, text: str) -> None:
        if not (text.isascii() and text.isdigit()):
            self.error = self.error or f"an event without a number as its id: {text!r}"
            return
        number = int(text)
        # Servers count from 0 or from 1.
        last = self.last_id if self.last_id is not None else min(number, 1) - 1
        self.jumps += number > last + 1
        self.repeats += number <= last
        self.last_id = number


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with one answer. failed, mismatch: 0 or 1. gaps, duplicates: places."""

    failed: int = 0
    gaps: int = 0
    duplicates: int = 0
    mismatch: int = 0


def judge(got: Transcript, reference: Transcript) -> Verdict:
    """Compare an answer with the undisturbed one.

    *failed*: there was an error, or no end after all attempts. Its text is not judged further.

    *mismatch*: a completion's text, tokens, number of tokens or finish reason differ. Depths do
    not count: which tokens wait for a flush may differ after a resumption, what they are may not.

    *gaps* and *duplicates*: the larger of what the ids and what the content tell, so that one loss
    seen in both counts once. By ids: each event whose id jumps, or repeats. By content: a
    completion that is the reference with one span left out is a gap, with one span given again a
    duplicate (by tokens where there are any, else by characters).
    """
    if got.failed:
        return Verdict(1, got.jumps, got.repeats, 0)
    gaps = duplicates = differing = 0
    for index in got.completions.keys() | reference.completions.keys():
        own = got.completions.get(index, Completion())
        right = reference.completions.get(index, Completion())
        if own == right:
            continue
        differing += 1
        moved = span_moved(right.tokens or right.text, own.tokens or own.text)
        gaps += moved > 0
        duplicates += moved < 0
    return Verdict(
        0, max(got.jumps, gaps), max(got.repeats, duplicates), mismatch=int(differing > 0)
    )


def span_moved(reference: Sequence[str], got: Sequence[str]) -> int:
    """How many items of one span are missing from ``got`` (above 0) or repeated in it (below).

    0 if the two are equal, or differ in another way.
    """
    same = 0
    while same < min(len(reference), len(got)) and reference[same] == got[same]:
        same += 1
    rest = len(got) - same
    start = len(reference) - rest
    if start < 0 or list(reference[start:]) != list(got[same:]):
        return 0
    return start - same
