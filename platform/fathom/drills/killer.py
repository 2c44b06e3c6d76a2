"""Kills processes, one at a time, by a plan."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from fathom.drills.plan import Blow

RECOVERY_S = 180.0
"""Longest that a kill waits for its pool to be whole enough; then it is left out."""

_LOOK_S = 0.25


@dataclass(frozen=True, slots=True)
class Victim:
    """A process that may be killed. name: for people, unique."""

    name: str
    pid: int


class Prey(Protocol):
    """What there is to kill."""

    def ready(self, kind: str) -> Sequence[Victim]:
        """The processes of a kind that live and serve now."""
        ...

    def fewest(self, kind: str) -> int:
        """How many of a kind must be ready before one of them may be killed.

        Two, so that one is left; one where a kind is a single process by design and all others
        are ready.
        """
        ...


@dataclass(slots=True)
class Kill:
    """A blow and what came of it.

    Attributes:
        at_s: since the start; None if it was not carried out. waited_s: for the pool to recover.
        name, pid: of the process that was killed.
    """

    blow: Blow
    at_s: float | None = None
    waited_s: float = 0.0
    name: str = ""
    pid: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        own = {"at_s": self.at_s, "waited_s": self.waited_s, "name": self.name, "pid": self.pid}
        return asdict(self.blow) | own


@dataclass(slots=True)
class Killer:
    """Carries a plan out on a thread of its own until it is stopped.

    A kind is left alone until enough of it are ready: a drill shows what the death of some costs,
    not of all. The time until the next kill counts from the kill before, however late that was.

    Args:
        on_kill: called after each kill, on this object's thread.

    Attributes:
        kills: those carried out, and those left out after waiting too long. error: what ended the
            thread, if not ``stop``.
    """

    prey: Prey
    plan: Iterator[Blow]
    on_kill: Callable[[Kill], None] = lambda kill: None
    kills: list[Kill] = field(default_factory=list)
    error: str = ""
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; the plan's time runs from now on."""
        self._thread = threading.Thread(target=self._run, name="fathom-killer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Kill nothing more; returns when that is certain."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        start = time.monotonic()
        try:
            for blow in self.plan:
                if self._stopped.wait(blow.after_s):
                    return
                kill = Kill(blow)
                victim = self._await_victim(kill)
                if self._stopped.is_set():
                    return
                if victim is not None:
                    with suppress(ProcessLookupError):  # it has just ended by itself
                        os.kill(victim.pid, signal.SIGKILL)
                        kill.at_s = round(time.monotonic() - start, 3)
                        kill.name, kill.pid = victim.name, victim.pid
                self.kills.append(kill)
                self.on_kill(kill)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def _await_victim(self, kill: Kill) -> Victim | None:
        """The process to kill, once its pool can spare it; None if that does not come about."""
        begin = time.monotonic()
        found = None
        while not self._stopped.is_set():
            # Who was killed a moment ago may still be listed.
            dead = {before.pid for before in self.kills}
            listed = self.prey.ready(kill.blow.kind)
            ready = {each.name: each for each in listed if each.pid not in dead}
            if ready and len(ready) >= self.prey.fewest(kill.blow.kind):
                found = ready[kill.blow.choose(list(ready))]
                break
            if time.monotonic() - begin > RECOVERY_S:
                break
            self._stopped.wait(_LOOK_S)
        kill.waited_s = round(time.monotonic() - begin, 3)
        return found
