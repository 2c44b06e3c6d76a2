"""The memory of prefixes against a slow one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fathom.routing.prefix_index import PrefixIndex


def chain(path: bytes) -> list[bytes]:
    return [path[: end + 1] for end in range(len(path))]


class SlowIndex:
    """The rules, written down without a thought of speed."""

    def __init__(self, max_entries: int, max_holders: int) -> None:
        self.max_entries, self.max_holders = max_entries, max_holders
        self.prefixes: list[bytes] = []  # least recently used first
        self.served: dict[bytes, list[str]] = {}  # latest replica first
        self.gone: set[tuple[bytes, str]] = set()

    def record(self, keys: list[bytes], name: str) -> None:
        for key in reversed(keys):
            if key in self.prefixes:
                self.prefixes.remove(key)
            self.prefixes.append(key)
            served = self.served.setdefault(key, [])
            if name in served:
                served.remove(name)
            served.insert(0, name)
            del served[self.max_holders :]
        while len(self.prefixes) > self.max_entries:
            del self.served[self.prefixes.pop(0)]

    def forget(self, name: str) -> None:
        for served in self.served.values():
            if name in served:
                served.remove(name)

    def holders(self, keys: list[bytes]) -> list[tuple[int, list[str]]]:
        found: list[tuple[int, list[str]]] = []
        known = 0
        while known < len(keys) and keys[known] in self.served:
            known += 1
        seen: set[str] = set()
        for depth in range(known, 0, -1):
            fresh = [name for name in self.served[keys[depth - 1]] if name not in seen]
            seen.update(fresh)
            if fresh:
                found.append((depth, fresh))
        return found


paths = st.binary(min_size=1, max_size=6).map(lambda raw: bytes(byte % 3 for byte in raw))
replicas = st.sampled_from(["a", "b", "c", "d", "e"])
actions = st.one_of(
    st.tuples(st.just("record"), paths, replicas),
    st.tuples(st.just("forget"), st.just(b"0"), replicas),
)


@given(
    max_entries=st.integers(1, 20),
    max_holders=st.integers(1, 6),
    steps=st.lists(actions, max_size=40),
    asked=st.lists(paths, min_size=1, max_size=5),
)
def test_it_remembers_what_a_slow_one_does(
    max_entries: int, max_holders: int, steps: list[tuple[str, bytes, str]], asked: list[bytes]
) -> None:
    index, slow = PrefixIndex(max_entries, max_holders), SlowIndex(max_entries, max_holders)
    for action, path, name in steps:
        if action == "record":
            index.record(chain(path), name)
            slow.record(chain(path), name)
        else:
            index.forget(name)
            slow.forget(name)
        assert len(index) == len(slow.prefixes) <= max_entries
        for other in (path, *asked):
            assert list(index.holders(chain(other))) == slow.holders(chain(other))


def test_what_is_dropped_is_the_end_of_a_chain() -> None:
    index = PrefixIndex(4)
    index.record(chain(b"abc"), "one")
    index.record(chain(b"xyz"), "two")
    assert list(index.holders(chain(b"abc"))) == [(1, ["one"])]
    assert list(index.holders(chain(b"xyz"))) == [(3, ["two"])]


def test_a_name_that_was_forgotten_starts_anew() -> None:
    index = PrefixIndex(10)
    index.record(chain(b"abc"), "one")
    index.forget("one")
    index.record(chain(b"a"), "one")
    assert list(index.holders(chain(b"abc"))) == [(1, ["one"])]
