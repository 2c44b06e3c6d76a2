"""What the choice of a replica promises."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.routing.loads import SILENT_AFTER_S
from fathom.routing.policy import AVOID_FOR_S, Reason, RoutingConfig, RoutingPolicy
from fathom.settings import ConfigError
from fathom.types import Request, Resumed

STEP, SLACK = 4, 3
REPLICAS = [f"r{number}" for number in range(5)]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def policy(clock: Clock | None = None, **settings) -> RoutingPolicy:
    settings = {"step_tokens": STEP, "slack": SLACK} | settings
    made = RoutingPolicy(RoutingConfig(**settings), seed=0, clock=clock or Clock())
    made.update(REPLICAS)
    return made


def request(tokens: str, **fields) -> Request:
    fields.setdefault("request_id", tokens)
    return Request(prompt_token_ids=tuple(map(ord, tokens)), **fields)


def send(routing: RoutingPolicy, asked: Request | None, *, over: bool = True) -> str:
    choice = routing.choose(asked)
    routing.started(choice.replica)
    if over:
        routing.ended(choice.replica)
    return choice.replica


def test_the_longest_known_prefix_decides() -> None:
    routing = policy()
    short = send(routing, request("aaaabbbb"))
    long = send(routing, request("aaaabbbbccccdddd" + "x"))
    # The first knows a part of the second's prompt, so that it is asked while all are idle.
    assert long == short
    other = send(routing, request("eeee"))
    assert other != short
    choice = routing.choose(request("aaaabbbbccccffff"))
    assert choice == (short, Reason.PREFIX, 12)


def test_tenants_share_no_prefix() -> None:
    routing = policy()
    first = send(routing, request("aaaabbbb", cache_salt="one"))
    choice = routing.choose(request("aaaabbbb", cache_salt="two"))
    assert choice.reason is Reason.LOAD and choice.replica != first


def test_what_a_prefix_is_worth_shrinks_with_its_part_of_the_prompt() -> None:
    routing = policy(ratio=1.0)
    home = send(routing, request("aaaabbbbcccc"))
    for _ in range(SLACK):
        routing.started(home)
    assert routing.choose(request("aaaabbbbcccc")).replica == home
    routing = policy(ratio=1.0)
    home = send(routing, request("aaaabbbbcccc"))
    for _ in range(SLACK):
        routing.started(home)
    # Two of three steps are worth two more requests than the least loaded has, not three.
    assert routing.choose(request("aaaabbbbdddd")).reason is Reason.LOAD


def test_a_prefix_that_everybody_wants_spreads() -> None:
    routing = policy(ratio=1.0)
    given_to = Counter(send(routing, request("aaaabbbb"), over=False) for _ in range(50))
    assert set(given_to) == set(REPLICAS)
    assert max(given_to.values()) <= min(given_to.values()) + SLACK + 1


def test_a_prompt_below_one_step_goes_to_the_least_loaded() -> None:
    routing = policy()
    assert Counter(send(routing, request("abc"), over=False) for _ in range(10)) == Counter(
        REPLICAS * 2
    )


def test_a_burst_is_counted_before_it_is_sent() -> None:
    routing = policy()
    chosen = Counter(routing.choose(request(f"{n:08}")).replica for n in range(20))
    assert chosen == Counter(REPLICAS * 4)


def test_choices_that_were_never_sent_stop_counting() -> None:
    clock = Clock()
    routing = policy(clock)
    home = routing.choose(request("aaaa")).replica
    for _ in range(SLACK):
        routing.choose(request("aaaa"))
    assert routing.choose(request("aaaa")).replica != home
    clock.now += 2
    assert routing.choose(request("aaaa")).reason is Reason.PREFIX


@given(sessions=st.lists(st.text(max_size=8), min_size=1, max_size=20), gone=st.integers(0, 4))
def test_sessions_are_kept_by_all_routers_and_those_of_others_do_not_move(
    sessions: list[str], gone: int
) -> None:
    asked = [request("aaaabbbb", session_id=f"s{session}") for session in sessions]
    one, two = policy(), policy()
    homes = [send(one, each) for each in asked]
    assert [send(two, each) for each in reversed(asked)] == homes[::-1]
    one.update([name for name in REPLICAS if name != REPLICAS[gone]])
    for each, home in zip(asked, homes, strict=True):
        now = send(one, each)
        assert now != REPLICAS[gone]
        assert now == home or home == REPLICAS[gone]
    one.update(REPLICAS)
    assert [send(one, each) for each in asked] == homes


def test_a_session_moves_on_the_ring_while_its_replica_has_too_much() -> None:
    routing = policy()
    asked = request("aaaa", session_id="mine")
    given_to = Counter(send(routing, asked, over=False) for _ in range(100))
    mean = 100 / len(REPLICAS)
    assert max(given_to.values()) <= mean + max(SLACK, 0.5 * mean) + 1
    home = max(given_to, key=given_to.__getitem__)
    for name, count in given_to.items():
        for _ in range(count):
            routing.ended(name)
    assert send(routing, asked) == home


def test_a_request_that_goes_on_is_not_given_to_where_it_was_lost() -> None:
    resumed = (Resumed(token_ids=(1,), depths=(4,)),)
    for session in ("", "mine"):
        routing = policy()
        home = send(routing, request("aaaabbbb", session_id=session))
        again = request("aaaabbbb", session_id=session, resumed=resumed)
        assert send(routing, again) != home
        routing.update([home])
        assert send(routing, again) == home  # there is no other


def test_replicas_that_are_gone_are_not_chosen_and_new_ones_are() -> None:
    routing = policy()
    home = send(routing, request("aaaabbbb"))
    left = [name for name in REPLICAS if name != home]
    routing.update(left)
    routing.ended(home)  # its last call ends later
    routing.reported(home, 7)
    assert send(routing, request("aaaabbbb")) in left
    routing.update(["new"])
    assert routing.choose(request("aaaabbbb")) == ("new", Reason.LOAD, 0)
    routing.update([])
    with pytest.raises(LookupError):
        routing.choose(request("aaaa"))


def test_a_replica_that_cannot_be_reached_is_left_alone_for_a_while() -> None:
    clock = Clock()
    routing = policy(clock)
    home = send(routing, request("aaaabbbb"))
    session = next(
        f"s{n}" for n in range(100) if send(routing, request("", session_id=f"s{n}")) == home
    )
    routing.unreachable(home)
    assert send(routing, request("aaaabbbb")) != home
    assert send(routing, request("", session_id=session)) != home
    assert home not in {send(routing, None, over=False) for _ in range(20)}
    clock.now += AVOID_FOR_S + 1
    assert send(routing, request("", session_id=session)) == home
    for name in REPLICAS:
        routing.unreachable(name)
    assert send(routing, request("aaaabbbb", session_id=session)) in REPLICAS


def test_a_replica_that_hangs_gets_no_more_until_it_answers() -> None:
    clock = Clock()
    routing = policy(clock)
    home = send(routing, request("aaaabbbb"), over=False)
    assert send(routing, request("aaaabbbb"), over=False) == home
    clock.now += SILENT_AFTER_S
    others = [send(routing, request("aaaabbbb")) for _ in range(20)]
    assert home not in others
    routing.reported(home, 2)
    routing.ended(home)
    clock.now += 1
    assert home in {send(routing, None, over=False) for _ in range(10)}


def test_requests_of_other_routers_count() -> None:
    clock = Clock()
    routing = policy(clock)
    home = send(routing, request("aaaabbbb"), over=False)
    routing.reported(home, 1 + SLACK + 1)  # one of them is ours
    assert send(routing, request("aaaabbbb")) != home
    clock.now += 11  # the figure is too old to say anything
    assert send(routing, request("aaaabbbb"), over=False) in REPLICAS


@pytest.mark.parametrize(
    ("field", "value"),
    [("step_tokens", 0), ("max_prefixes", 0.5), ("slack", -1), ("ratio", 0.9), ("ring_points", 0)],
)
def test_settings_are_checked(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        RoutingConfig(**{field: value}).validate()
    RoutingConfig().validate()
