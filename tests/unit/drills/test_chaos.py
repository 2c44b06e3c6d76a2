"""The whole drill, on a server that breaks streams and processes that do nothing but die."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fathom.drills.chaos import Chaos, ChaosOptions, DrillError
from fathom.drills.client import StreamClient
from fathom.drills.leaks import Held
from tests.unit.drills.conftest import BODY, Pool


class Cluster(Pool):
    """Sleeping processes of every kind, mended as soon as somebody waits for them.

    Args:
        held: what is found to be held, look by look; the last is repeated.
    """

    def __init__(self, *held: Held) -> None:
        super().__init__(3)
        self.seen = list(held)
        self.rested = 0

    def wait_until_whole(self, seconds: float) -> bool:
        self.mend()
        return True

    def mark_rest(self) -> None:
        self.rested += 1

    def held(self) -> Held:
        return self.seen.pop(0) if len(self.seen) > 1 else self.seen[0]

    def known_streams(self) -> int:
        return 1_000


def drill(url: str, cluster: Cluster, requests: int = 24, settle_s: float = 20) -> Chaos:
    options = ChaosOptions(
        requests=requests,
        concurrency=2,
        kill_every_s=0.05,
        kinds=["shallow", "deep"],
        seed=5,
        settle_s=settle_s,
    )
    bodies = [{**BODY, "seed": number} for number in range(2)]
    return Chaos(StreamClient(url, pause_s=0.05), cluster, bodies, options)


def test_breaks_and_kills_that_nobody_notices(serve: Any) -> None:
    _, url = serve(*[("all", 0)] * 2, *[("break", 1), ("reset", 0), ("tear", 2)] * 8)
    cluster = Cluster(Held(requests=1), Held())
    chaos = drill(url, cluster)
    try:
        report = chaos.run()
    finally:
        cluster.close()
    found = report.as_dict()
    assert report.ok, found
    assert (found["requests"], found["failed"], found["mismatches"]) == (24, 0, 0)
    assert (found["gaps"], found["duplicates"], found["leaked_blocks"]) == (0, 0, 0)
    assert 12 <= found["reconnects"] <= 24  # a break after the last event is none
    assert found["kills"] == len([each for each in found["plan"] if each["pid"]]) >= 1
    assert cluster.rested == 1
    assert found["seconds"] > 0


def test_every_fault_is_counted_once(serve: Any) -> None:
    _, url = serve(*[("all", 0)] * 2, ("repeat", 2), ("status", 400), ("repeat", 3))
    cluster = Cluster(Held(), Held(leases=2, objects=1))
    chaos = drill(url, cluster, requests=6, settle_s=0)
    try:
        report = chaos.run()
    finally:
        cluster.close()
    found = report.as_dict()
    assert not report.ok
    assert (found["failed"], found["duplicates"], found["mismatches"]) == (1, 2, 2)
    assert (found["gaps"], found["leaked_blocks"]) == (0, 3)
    (failure,) = found["errors"].values()
    assert failure["error"].startswith("400")


def test_a_server_that_fails_undisturbed_is_not_drilled(serve: Any) -> None:
    _, url = serve(("status", 400))
    cluster = Cluster(Held())
    try:
        with pytest.raises(DrillError, match="fails undisturbed: 400"):
            drill(url, cluster).run()
        assert len(cluster.ready("deep")) == 3
    finally:
        cluster.close()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_drill_keeps_what_it_found(serve: Any) -> None:
    _, url = serve(*[("all", 0)] * 6, *[("hang", 1)] * 40)
    cluster = Cluster(Held())
    chaos = drill(url, cluster)
    interrupted = threading.Event()

    def on_request(verdict: object) -> None:
        if len(chaos.report.verdicts) >= 4 and not interrupted.is_set():
            interrupted.set()
            _thread.interrupt_main()

    chaos.on_request = on_request
    try:
        with pytest.raises(KeyboardInterrupt):
            chaos.run()
    finally:
        cluster.close()
    found = chaos.report.as_dict()
    assert found["requests"] == 4
    assert found["failed"] == 0
    assert found["leaked_blocks"] is None
