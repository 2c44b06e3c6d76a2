"""Consistent hashing: little moves when replicas come and go."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fathom.routing.hashing import HashRing

KEYS = [f"session {number}" for number in range(200)]
names = st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=12)


def ring_of(*groups: set[str], points: int = 16) -> HashRing:
    """A ring that was given one set of names after the other."""
    ring = HashRing(points)
    for group in groups:
        ring.update(group)
    return ring


def owners(ring: HashRing) -> dict[str, str]:
    return {key: next(ring.walk(key)) for key in KEYS}


@given(before=names, joins=names)
def test_who_joins_takes_keys_for_itself_alone(before: set[str], joins: set[str]) -> None:
    old, new = owners(ring_of(before)), owners(ring_of(before, before | joins))
    for key in KEYS:
        assert new[key] == old[key] or new[key] in joins - before


@given(before=names, leaves=names)
def test_who_leaves_gives_its_own_keys_away_and_no_other(
    before: set[str], leaves: set[str]
) -> None:
    if not before - leaves:
        return
    old, new = owners(ring_of(before)), owners(ring_of(before, before - leaves))
    for key in KEYS:
        assert new[key] == old[key] or old[key] in leaves


@given(first=names, second=names)
def test_a_ring_follows_from_its_names_alone(first: set[str], second: set[str]) -> None:
    built, fresh = ring_of(first, first | second, second), ring_of(second)
    assert len(built) == len(second)
    for key in KEYS[:20]:
        assert list(built.walk(key)) == list(fresh.walk(key))


@given(some=names)
def test_a_walk_meets_every_name_once(some: set[str]) -> None:
    assert sorted(ring_of(some).walk("session")) == sorted(some)


def test_keys_are_spread_evenly() -> None:
    ring = ring_of({f"replica {number}" for number in range(20)}, points=64)
    shares = Counter(next(ring.walk(f"key {number}")) for number in range(20_000))
    assert len(shares) == 20
    assert max(shares.values()) < 1.5 * 1000
    assert min(shares.values()) > 0.5 * 1000


def test_a_ring_without_names_owns_nothing() -> None:
    ring = ring_of({"a"}, set())
    assert list(ring.walk("session")) == []
