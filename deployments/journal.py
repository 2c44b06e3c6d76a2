"""The journal of streams as a Ray actor, one for all ingresses of an application."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError

from fathom.api.journal import Answer, Entry, JournalLost, MemoryJournal, NotTaken, Taken
from fathom.api.records import StreamKey
from fathom.kvstore.ray_store import NAMESPACE

MAX_BYTES = 256 << 20
_START_S = 10.0
"""Seconds that an ingress waits for the journal when it starts."""
_ATTEND_S = 30.0
"""Seconds between two words of an ingress."""
_ALONE_S = 600.0
_WATCH_S = 5.0
_PAUSE_S = 1.0


class JournalActor:
    """A ``MemoryJournal`` that forgets in time also when nobody calls.

    It outlives who started it: an ingress may die and come back. When the whole application has
    gone without ending it, it ends itself.

    Args:
        keep_s, max_bytes: see ``MemoryJournal``.
        alone_s: seconds without a word of any ingress after which it ends itself.
    """

    def __init__(self, keep_s: float, max_bytes: int, alone_s: float = _ALONE_S) -> None:
        self._memory = MemoryJournal(keep_s=keep_s, max_bytes=max_bytes)
        self._lock = threading.Lock()
        self._called = time.monotonic()
        self._alone_s = alone_s
        self._self = ray.get_runtime_context().current_actor
        threading.Thread(target=self._watch, name="fathom-journal", daemon=True).start()

    def append(self, entries: Sequence[Entry]) -> Answer:
        """See ``Journal.append``."""
        with self._lock:
            self._called = time.monotonic()
            return self._memory.append(entries)

    def take(self, key: StreamKey, after: int, body: bytes | None) -> Taken | NotTaken:
        """See ``Journal.take``."""
        with self._lock:
            self._called = time.monotonic()
            return self._memory.take(key, after=after, body=body)

    def attend(self, keep_s: float) -> int:
        """Say that an ingress lives, and what its setting is; returns the number of streams."""
        with self._lock:
            self._called = time.monotonic()
            self._memory.keep_s = keep_s
            return len(self._memory)

    def unfinished(self) -> int:
        """Streams here that have not ended: live ones, and ones whose clients may come back."""
        with self._lock:
            return self._memory.unfinished

    def _watch(self) -> None:
        while True:
            time.sleep(min(_WATCH_S, self._memory.keep_s, self._alone_s / 2))
            with self._lock:
                self._memory.expire()
            if time.monotonic() - self._called > max(self._alone_s, self._memory.keep_s):
                ray.kill(self._self)
                return


class RayJournal:
    """An ingress's way to the journal; see ``fathom.api.journal.Journal``.

    Args:
        application: whose journal it is; started if there is none.
        keep_s: seconds for which it keeps streams.

    Attributes:
        application: as above.
    """

    def __init__(self, application: str, *, keep_s: float) -> None:
        self.application = application
        self._keep_s = keep_s
        self._ended = False
        self._wake = threading.Event()
        self._actor = self._find()
        with contextlib.suppress(RayError):  # streams go without it until it is there
            ray.get(self._actor.attend.remote(keep_s), timeout=_START_S)
        threading.Thread(target=self._attend, name="fathom-journal", daemon=True).start()

    async def append(self, entries: Sequence[Entry]) -> Answer:
        """See ``Journal.append``."""
        answer: Answer = await self._call("append", list(entries))
        return answer

    async def take(
        self, key: StreamKey, *, after: int, body: bytes | None = None
    ) -> Taken | NotTaken:
        """See ``Journal.take``."""
        found: Taken | NotTaken = await self._call("take", key, after, body)
        return found

    def close(self) -> None:
        """Say no more that this ingress lives."""
        self._ended = True
        self._wake.set()

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._actor, method).remote(*arguments)
        except RayError as error:
            if isinstance(error, ActorDiedError):  # Ray will not start this one again
                self._wake.set()
            raise JournalLost(f"the journal of streams: {type(error).__name__}") from error

    def _attend(self) -> None:
        """Keep the journal from ending itself, and start another one when it was ended."""
        while True:
            self._wake.wait(_ATTEND_S)
            self._wake.clear()
            if self._ended:
                return
            try:
                ray.get(self._actor.attend.remote(self._keep_s), timeout=_ATTEND_S)
            except RayError:
                time.sleep(_PAUSE_S)
                if not self._ended and ray.is_initialized():
                    self._actor = self._find()

    def _find(self) -> Any:
        actor: Any = ray.remote(JournalActor)
        return actor.options(
            name=_name(self.application),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,
        ).remote(self._keep_s, MAX_BYTES)


def unfinished_streams(application: str) -> int:
    """Streams in an application's journal that have not ended; 0 without a journal.

    Raises:
        RayError: if it does not answer.
    """
    try:
        actor: Any = ray.get_actor(_name(application), namespace=NAMESPACE)
    except ValueError:
        return 0
    found: int = ray.get(actor.unfinished.remote(), timeout=_START_S)
    return found


def stop_journal(application: str) -> None:
    """End an application's journal, and with it what it kept."""
    try:
        ray.kill(ray.get_actor(_name(application), namespace=NAMESPACE))
    except ValueError:
        return  # there is none


def _name(application: str) -> str:
    return f"journal-of-{application}"
