"""Which deep replica a shallow replica tries first, and what it does about those that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from deployments.peers import Balance, Breakers, Endpoint, Peers, rank

NODES = ("here", "there", "elsewhere")
endpoints = st.lists(
    st.builds(
        Endpoint,
        address=st.integers(0, 30).map("grpc://10.0.0.1:{}".format),
        node=st.sampled_from(NODES),
        free_leases=st.integers(0, 3),
        queue_s=st.sampled_from([0.0, 0.02, 0.5]),
    ),
    max_size=8,
    unique_by=lambda each: each.address,
)


def order(found: Sequence[Endpoint], broken: Sequence[str] = (), name: str = "a") -> list[str]:
    return rank(found, node="here", name=name, is_broken=lambda address: address in broken)


def at(address: str, node: str = "here", free: int = 1, queue_s: float = 0.0) -> Endpoint:
    return Endpoint(address, node, free, queue_s)


def test_the_same_node_comes_before_another_with_more_room() -> None:
    assert order([at("far", "there", free=3), at("near")]) == ["near", "far"]


def test_one_without_room_or_with_a_long_queue_comes_after_another_node() -> None:
    assert order([at("full", free=0), at("far", "there")]) == ["far", "full"]
    assert order([at("late", queue_s=1.0), at("far", "there")]) == ["far", "late"]


def test_one_that_fails_comes_last() -> None:
    found = [at("near"), at("full", "there", free=0), at("far", "there")]
    assert order(found, broken=["near"]) == ["far", "full", "near"]


def test_replicas_that_start_together_spread() -> None:
    found = [at(f"deep {number}") for number in range(4)]
    first = {order(found, name=f"shallow {number}")[0] for number in range(40)}
    assert first == {each.address for each in found}


@given(endpoints, st.randoms())
def test_nobody_is_left_out_and_the_order_of_answers_does_not_matter(found, random) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)
    assert order(found) == order(shuffled)
    assert sorted(order(found)) == sorted(each.address for each in found)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_pauses_grow_with_each_failure_and_are_forgotten_after_good_service() -> None:
    clock = Clock()
    breakers = Breakers(clock)
    lengths = []
    for _ in range(8):
        breakers.failed("deep")
        start = clock.now
        while breakers.is_broken("deep"):
            clock.now += 0.5
        lengths.append(clock.now - start)
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60]
    clock.now += 61  # as long as the last pause, without a failure
    breakers.failed("deep")
    clock.now += 1
    assert not breakers.is_broken("deep")


def test_an_address_that_is_gone_is_forgotten() -> None:
    breakers = Breakers()
    breakers.failed("deep")
    assert breakers.is_broken("deep")
    breakers.keep(["another"])
    assert not breakers.is_broken("deep")


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_list_never_waits_and_outlives_a_question_that_fails_or_hangs() -> None:
    answers = [[at("a")], RuntimeError("Serve is busy"), [], [at("b")]]
    hang = threading.Event()

    def ask() -> Sequence[Endpoint]:
        if not answers:
            hang.wait(10)
            return [at("c")]
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    peers = Peers(ask, node="here", name="me", refresh_s=0.01)
    seen = set()
    until(lambda: seen.add(tuple(peers())) or ("b",) in seen)
    assert seen <= {(), ("a",), ("b",)}
    start = time.monotonic()
    assert peers() == ["b"]  # while the question hangs
    assert time.monotonic() - start < 1
    peers.failed("b")
    hang.set()
    until(lambda: peers() == ["c"])
    peers.close()


def test_a_replica_moves_where_there_is_less_to_do_and_not_too_often() -> None:
    now, chance = [0.0], [0.0]
    balance = Balance(clock=lambda: now[0], chance=lambda: chance[0])
    full, new = Endpoint("full", "n", 0, 0.05), Endpoint("new", "n", 3, 0.0)
    assert not balance.should_move("full", ["new", "full"], [full, new])  # it has just started
    now[0] = 61.0
    assert not balance.should_move("full", ["full", "new"], [full, new])  # it is where it should be
    one_fewer = Endpoint("new", "n", 1, 0.0)
    assert not balance.should_move("full", ["new", "full"], [full, one_fewer])
    idle = Endpoint("full", "n", 0, 0.0)
    assert not balance.should_move("full", ["new", "full"], [idle, new])
    assert not balance.should_move("gone", ["new", "full"], [full, new])
    chance[0] = 0.9
    assert not balance.should_move("full", ["new", "full"], [full, new])
    chance[0] = 0.1
    assert balance.should_move("full", ["new", "full"], [full, new])
    now[0] = 100.0
    assert not balance.should_move("full", ["new", "full"], [full, new])
    now[0] = 122.0
    assert balance.should_move("full", ["new", "full"], [full, new])
