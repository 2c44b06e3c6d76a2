"""The chaos drill: load while processes die, against the same requests undisturbed."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fathom.drills.client import StreamClient
from fathom.drills.killer import Kill, Killer, Prey, Victim
from fathom.drills.leaks import SETTLE_S, Held, settle
from fathom.drills.load import run_load
from fathom.drills.plan import blows
from fathom.drills.transcript import Transcript, Verdict, judge

SHOWN_ERRORS = 20
RECOVERY_S = 180.0


class DrillError(RuntimeError):
    """A drill that could not be held, because the server fails undisturbed."""


class Cluster(Prey, Protocol):
    """The server under drill."""

    def wait_until_whole(self, seconds: float) -> bool:
        """Wait until every pool has all of its processes; returns whether it came about."""
        ...

    def mark_rest(self) -> None:
        """Take what is held now for what is held at rest."""
        ...

    def held(self) -> Held:
        """What is held now that should not be at rest."""
        ...

    def known_streams(self) -> int:
        """Live streams that the journal has."""
        ...


@dataclass(frozen=True, slots=True)
class _Sparing:
    """Spares one of the two that know a stream, its ingress and the journal, while that is all.

    The journal is spared while a client that has lost its ingress has not come back; ingresses
    while a journal that was started anew has not been told of all streams.
    """

    cluster: Cluster
    client: StreamClient

    def ready(self, kind: str) -> Sequence[Victim]:
        """See ``Prey.ready``."""
        if kind == "journal" and self.client.coming_back:
            return ()
        if kind == "ingress" and self.cluster.known_streams() < self.client.reading:
            return ()
        return self.cluster.ready(kind)

    def fewest(self, kind: str) -> int:
        """See ``Prey.fewest``."""
        return self.cluster.fewest(kind)


@dataclass(frozen=True, kw_only=True)
class ChaosOptions:
    """requests, concurrency: of the load. kill_every_s: mean seconds between two kills.

    Attributes:
        kinds: of process to kill. seed: of the plan, and of the requests' order.
        settle_s: longest that the server may take to let go of everything.
    """

    requests: int
    concurrency: int
    kill_every_s: float
    kinds: Sequence[str]
    seed: int
    settle_s: float = SETTLE_S


@dataclass(slots=True)
class ChaosReport:
    """What a drill found; complete also if it was cut short.

    Attributes:
        seconds: of the load. held: after it, None if it was not looked. whole: whether every pool
            recovered.
    """

    transcripts: dict[int, Transcript] = field(default_factory=dict)
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)
    seconds: float = 0.0
    held: Held | None = None
    whole: bool = True
    killer_error: str = ""

    def count(self, fault: str) -> int:
        """The sum of a field of ``Verdict`` over all requests."""
        return sum(getattr(verdict, fault) for verdict in self.verdicts.values())

    @property
    def killed(self) -> int:
        """Processes that were killed."""
        return sum(kill.at_s is not None for kill in self.kills)

    @property
    def ok(self) -> bool:
        """Whether nothing was lost, changed or left behind."""
        faults = ("failed", "gaps", "duplicates", "mismatch")
        clean = self.held is not None and self.held.total == 0
        return clean and self.whole and not self.killer_error and not any(map(self.count, faults))

    def as_dict(self) -> dict[str, Any]:
        """For JSON. ``leaked_blocks`` is the sum of ``leaks``, None if nobody looked."""
        errors = {
            str(index): {"error": found.error or "no end", "breaks": found.breaks}
            for index, found in sorted(self.transcripts.items())
            if found.failed
        }
        return {
            "requests": len(self.verdicts),
            "kills": self.killed,
            "failed": self.count("failed"),
            "gaps": self.count("gaps"),
            "duplicates": self.count("duplicates"),
            "mismatches": self.count("mismatch"),
            "leaked_blocks": None if self.held is None else self.held.total,
            "leaks": None if self.held is None else self.held.as_dict(),
            "reconnects": sum(found.reconnects for found in self.transcripts.values()),
            "resumptions": sum(found.resumptions for found in self.transcripts.values()),
            "recovered": self.whole,
            "killer_error": self.killer_error,
            "errors": dict(list(errors.items())[:SHOWN_ERRORS]),
            "plan": [kill.as_dict() for kill in self.kills],
            "seconds": round(self.seconds, 3),
        }


@dataclass(slots=True)
class Chaos:
    """One drill.

    Args:
        bodies: the distinct requests, streamed and greedy.
        on_reference, on_request, on_kill: called as things happen, on several threads.

    Attributes:
        report: what was found until now.
    """

    client: StreamClient
    cluster: Cluster
    bodies: Sequence[Mapping[str, Any]]
    options: ChaosOptions
    on_reference: Callable[[Transcript], None] = lambda found: None
    on_request: Callable[[Verdict], None] = lambda verdict: None
    on_kill: Callable[[Kill], None] = lambda kill: None
    report: ChaosReport = field(default_factory=ChaosReport)
    _name: str = field(default_factory=lambda: f"chaos-{uuid.uuid4().hex[:12]}")

    def run(self) -> ChaosReport:
        """Hold the drill. After a ``KeyboardInterrupt``, ``report`` has what was found.

        Raises:
            DrillError: if a request fails before anything is killed.
        """
        references = self._undisturbed()
        settle(self.cluster.held, self.options.settle_s)
        self.cluster.mark_rest()
        order = [i % len(self.bodies) for i in range(self.options.requests)]
        random.Random(f"fathom order {self.options.seed}").shuffle(order)
        report = self.report

        def on_end(index: int, found: Transcript) -> None:
            verdict = judge(found, references[order[index]])
            report.transcripts[index] = found
            report.verdicts[index] = verdict
            self.on_request(verdict)

        plan = blows(self.options.seed, self.options.kinds, self.options.kill_every_s)
        killer = Killer(_Sparing(self.cluster, self.client), plan, self.on_kill)
        report.kills = killer.kills
        start = time.perf_counter()
        killer.start()
        try:
            run_load(
                self.client,
                [self.bodies[place] for place in order],
                concurrency=self.options.concurrency,
                name=self._name,
                on_end=on_end,
            )
        finally:
            killer.stop()
            report.seconds = time.perf_counter() - start
            report.killer_error = killer.error
        report.whole = self.cluster.wait_until_whole(RECOVERY_S)
        report.held = settle(self.cluster.held, self.options.settle_s)
        return report

    def _undisturbed(self) -> dict[int, Transcript]:
        """The reference answers, by place in ``bodies``."""
        found = run_load(
            self.client,
            self.bodies,
            concurrency=self.options.concurrency,
            name=f"{self._name}-undisturbed",
            on_end=lambda _, transcript: self.on_reference(transcript),
        )
        for index, transcript in found.items():
            faults = judge(transcript, transcript)
            if faults != Verdict():
                raise DrillError(
                    f"request {index} fails undisturbed: {transcript.error or faults}; mend the "
                    "server before the drill."
                )
        return found
