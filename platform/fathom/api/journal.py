"""The journal of streams: what clients have been sent, for as long as they may come back for more.

An event is in the journal before it leaves, so the last event that a client saw is never unknown
to whoever goes on with its stream. The journal is one for all ingresses; who takes a stream over
gets a higher *epoch*, and what the former one still writes is refused.
"""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from fathom.api.records import News, Plan, StreamKey

_RECORD_BYTES = 1000  # of an empty one, roughly


class JournalLost(ConnectionError):
    """The journal does not answer; what it knew may be gone."""


class Verdict(StrEnum):
    """What became of an entry."""

    KEPT = "kept"
    UNKNOWN = "unknown"  # nothing that it could follow is here: enter the stream whole
    TAKEN = "taken"  # somebody else goes on with this stream


class NotTaken(StrEnum):
    """Why a stream cannot be taken over."""

    UNKNOWN = "unknown"
    OTHER_BODY = "other_body"
    BEHIND = "behind"  # the journal has fewer events than the client says it saw


@dataclass(frozen=True, slots=True)
class Entry:
    """News of one stream.

    Attributes:
        epoch: of the writer. start: pieces of news that came before these.
        plan: given where this is the whole stream from its start, which replaces what is there.
    """

    key: StreamKey
    epoch: int
    start: int
    news: tuple[News, ...] = ()
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The verdicts on entries, in order.

    Attributes:
        incarnation: another one after a restart, which forgets everything.
    """

    incarnation: str
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """A stream that somebody takes over, with all its news and the epoch to go on under.

    Attributes:
        incarnation: of the journal that has it; see ``Answer``.
    """

    plan: Plan
    epoch: int
    news: tuple[News, ...]
    incarnation: str

    @property
    def ended(self) -> bool:
        """Whether nothing is left to generate."""
        return bool(self.news) and self.news[-1].ended


class Journal(Protocol):
    """A journal somewhere."""

    async def append(self, entries: Sequence[Entry]) -> Answer:
        """Write entries; one without news only says that its stream is alive.

        Raises:
            JournalLost: if it did not answer; the entries may have been written or not.
        """
        ...

    async def take(
        self, key: StreamKey, *, after: int, body: bytes | None = None
    ) -> Taken | NotTaken:
        """Take a stream over: its former writer is refused from now on.

        Args:
            after: number of events that the client has seen.
            body: digest of the request's body, where the client sent it again.

        Raises:
            JournalLost: if it did not answer.
        """
        ...


@dataclass(slots=True)
class _Record:
    plan: Plan
    epoch: int
    news: list[News]
    nbytes: int
    touched: float


class MemoryJournal:
    """A journal in this process: no I/O, no locks, no tasks. See ``Journal`` for what calls do.

    Args:
        keep_s: seconds for which a stream is kept after the last word of it.
        max_bytes: of all records, about; the least recently written goes first.
        clock: seconds, monotonic.

    Attributes:
        nbytes: of all records now.
    """

    def __init__(
        self, *, keep_s: float, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.keep_s = keep_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._records: OrderedDict[StreamKey, _Record] = OrderedDict()  # oldest word first
        self._incarnation = uuid.uuid4().hex
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._records)

    @property
    def unfinished(self) -> int:
        """Streams here that have not ended."""
        return sum(not (r.news and r.news[-1].ended) for r in self._records.values())

    def append(self, entries: Sequence[Entry]) -> Answer:
        """See ``Journal.append``."""
        self.expire()
        return Answer(self._incarnation, tuple(map(self._enter, entries)))

    def take(self, key: StreamKey, *, after: int, body: bytes | None = None) -> Taken | NotTaken:
        """See ``Journal.take``."""
        self.expire()
        record = self._records.get(key)
        if record is None:
            return NotTaken.UNKNOWN
        if body is not None and body != record.plan.body:
            return NotTaken.OTHER_BODY
        if after > sum(len(piece.events) for piece in record.news):
            return NotTaken.BEHIND
        # By the time of day, so that epochs go on rising when a restart has lost the old ones.
        record.epoch = max(record.epoch + 1, new_epoch())
        self._touch(key, record)
        return Taken(record.plan, record.epoch, tuple(record.news), self._incarnation)

    def expire(self) -> None:
        """Forget what nobody has written or asked for in ``keep_s`` seconds."""
        oldest_kept = self._clock() - self.keep_s
        while self._records:
            key, record = next(iter(self._records.items()))
            if record.touched >= oldest_kept:
                return
            self._drop(key)

    def _enter(self, entry: Entry) -> Verdict:
        record = self._records.get(entry.key)
        if record is not None and record.epoch > entry.epoch:
            return Verdict.TAKEN
        if entry.plan is not None:
            if record is not None:
                self._drop(entry.key)
            nbytes = _RECORD_BYTES + sum(
                8 * len(request.prompt_token_ids) for request in entry.plan.requests
            )
            record = _Record(entry.plan, entry.epoch, [], nbytes, 0.0)
            self._records[entry.key] = record
            self.nbytes += nbytes
        elif record is None or record.epoch < entry.epoch or len(record.news) != entry.start:
            return Verdict.UNKNOWN
        record.news += entry.news
        grown = sum(piece.nbytes for piece in entry.news)
        record.nbytes += grown
        self.nbytes += grown
        self._touch(entry.key, record)
        if record.nbytes > self._max_bytes:  # no room however many others go
            self._drop(entry.key)
            return Verdict.UNKNOWN
        while self.nbytes > self._max_bytes:
            self._drop(next(iter(self._records)))
        return Verdict.KEPT

    def _touch(self, key: StreamKey, record: _Record) -> None:
        record.touched = self._clock()
        self._records.move_to_end(key)

    def _drop(self, key: StreamKey) -> None:
        self.nbytes -= self._records.pop(key).nbytes


class LocalJournal:
    """A ``MemoryJournal`` behind the interface of one that is elsewhere."""

    def __init__(self, memory: MemoryJournal) -> None:
        self._memory = memory

    async def append(self, entries: Sequence[Entry]) -> Answer:
        """See ``Journal.append``."""
        return self._memory.append(entries)

    async def take(
        self, key: StreamKey, *, after: int, body: bytes | None = None
    ) -> Taken | NotTaken:
        """See ``Journal.take``."""
        return self._memory.take(key, after=after, body=body)


def new_epoch() -> int:
    """An epoch above all that were given out before, of clocks that agree."""
    return time.time_ns()
