"""A deep replica dies or hangs: its sequences go on at another, and no token differs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.dataplane.client import RemoteDeepStage
from fathom.engine.deep import LocalDeepStage
from fathom.engine.engine import Engine
from fathom.types import AcceptMode, FinishReason, RequestOutput
from tests.unit.dataplane.conftest import TOKEN, hello_of
from tests.unit.engine.conftest import make_engine_of, request, run
from tests.unit.engine.test_engine import random_requests

BLOCKS = 160
ROOT = Path(__file__).parents[3]


class Replicas:
    """Deep replicas as processes, and an engine over them; ``alive`` is what it is told."""

    def __init__(self, decoder, model_dir: Path, count: int) -> None:
        command = [sys.executable, "-m", "tests.integration.dataplane.deep_process"]
        self.processes = [
            subprocess.Popen(
                [*command, str(model_dir), str(BLOCKS)],
                cwd=ROOT, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(count)
        ]  # fmt: skip
        self.alive = [process.stdout.readline().strip() for process in self.processes]

        def connect(local: LocalDeepStage) -> RemoteDeepStage:
            return RemoteDeepStage(
                lambda: self.alive, hello_of(local), token=TOKEN, deadline_s=2.0, give_up_s=1.0
            )

        self.engine = make_engine_of(decoder, model_dir, BLOCKS, connect, max_num_seqs=8)

    def close(self) -> None:
        self.engine.close()
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture
def replicas(decoder, model_dir: Path) -> Iterator[Replicas]:
    found = Replicas(decoder, model_dir, 2)
    yield found
    found.close()


@pytest.fixture(scope="module")
def alone(decoder, model_dir: Path) -> Engine:
    return make_engine_of(decoder, model_dir, BLOCKS, max_num_seqs=8)


def results(outputs: list[RequestOutput]) -> dict:
    """Tokens of every completion as they were shown: a gap or a duplicate would show too."""
    found: dict = {}
    for output in outputs:
        ids = found.setdefault((output.request_id, output.index), [])
        ids += [token.id for token in output.tokens]
        if output.finish_reason is not None:
            ids.append(output.finish_reason.value)
    return found


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("seed", [1, 2])
def test_no_token_is_lost_or_doubled(
    replicas: Replicas, alone: Engine, blow: signal.Signals, seed: int
) -> None:
    requests = [
        item for item in random_requests(24, seed) if item.compute.mode is not AcceptMode.COPY
    ]
    engine, outputs = replicas.engine, []
    for item in requests:
        engine.add_request(item)
    moment = random.Random(seed).randint(3, 25)
    for step in range(10_000):
        if step == moment:
            os.kill(replicas.processes[0].pid, blow)
        if not engine.has_work():
            break
        outputs += engine.step()
    whole = run(alone, requests)
    expected = {key: [*each.ids, each.last.finish_reason.value] for key, each in whole.items()}
    assert results(outputs) == expected
    assert engine._deep._exchange.address == replicas.alive[1]
    engine.check_integrity()


def test_with_nobody_left_requests_end_honestly_and_later_ones_find_a_new_peer(
    replicas: Replicas, alone: Engine
) -> None:
    ask = [request("a", [5, 6, 7]), request("b", list(range(3, 33)), n=2)]
    everyone, replicas.alive = replicas.alive, []
    for item in ask:
        replicas.engine.add_request(item)
    replicas.engine.step()
    replicas.processes[0].kill()
    start, outputs = time.monotonic(), []
    while replicas.engine.has_work():
        outputs += replicas.engine.step()
    assert time.monotonic() - start < 10
    ends = [output for output in outputs if output.finish_reason is not None]
    assert {end.finish_reason for end in ends} == {FinishReason.ERROR}
    assert all("no deep stage is left: there is no deep replica" in end.error for end in ends)
    replicas.alive = everyone[1:]
    found, expected = run(replicas.engine, ask), run(alone, ask)
    assert {k: c.ids for k, c in found.items()} == {k: c.ids for k, c in expected.items()}


@pytest.mark.parametrize("seed", [3])
def test_moving_to_another_deep_replica_changes_no_token(
    replicas: Replicas, alone: Engine, seed: int
) -> None:
    requests = [
        item for item in random_requests(16, seed) if item.compute.mode is not AcceptMode.COPY
    ]
    engine, outputs, step = replicas.engine, [], 0
    for item in requests:
        engine.add_request(item)
    while engine.has_work():
        step += 1
        if step % 9 == 0:
            replicas.alive.reverse()
            engine.move_deep()
        outputs += engine.step()
    whole = run(alone, requests)
    expected = {key: [*each.ids, each.last.finish_reason.value] for key, each in whole.items()}
    assert results(outputs) == expected
    assert engine.deep.stats()["deep_reopens"] >= 3
