"""Which replicas have served which prefixes, as far as a bounded memory reaches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from fathom.kvstore.keys import BlockKey

Holders = tuple[int, ...]


class PrefixIndex:
    """The last replicas that served each prefix, least recently used out first.

    A prefix is known by the last key of its chain (``kvstore.keys.extend_keys``). A prefix has
    always been used less recently than the shorter ones in it, so what is dropped is the end of
    some chain and the rest can still be found.

    Args:
        max_entries: prefixes that are remembered, at least 1; about 200 bytes each.
        max_holders: replicas that are remembered for one prefix, the latest ones.
    """

    def __init__(self, max_entries: int, max_holders: int = 8) -> None:
        self._max_entries = max_entries
        self._max_holders = max_holders
        self._entries: OrderedDict[BlockKey, Holders] = OrderedDict()
        # A number is never used again: those of replicas that are gone stay in entries.
        self._names: dict[int, str] = {}
        self._numbers: dict[str, Holders] = {}
        self._next_number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def record(self, keys: Sequence[BlockKey], name: str) -> None:
        """A replica serves a prompt.

        Args:
            keys: of the prompt's chain, from its first block on.
        """
        # Most prefixes have one holder: they share one tuple.
        alone = self._numbers.get(name)
        if alone is None:
            alone = self._numbers[name] = (self._next_number,)
            self._names[self._next_number] = name
            self._next_number += 1
        number = alone[0]
        entries = self._entries
        for key in reversed(keys):
            holders = entries.get(key)
            if holders is None:
                entries[key] = alone
                continue
            if holders[0] != number:
                entries[key] = self._with(alone, holders)
            entries.move_to_end(key)
        while len(entries) > self._max_entries:
            entries.popitem(last=False)

    def _with(self, alone: Holders, holders: Holders) -> Holders:
        others = [held for held in holders if held != alone[0] and held in self._names]
        if not others:
            return alone
        return (*alone, *others[: self._max_holders - 1])

    def holders(self, keys: Sequence[BlockKey]) -> Iterator[tuple[int, list[str]]]:
        """Leading blocks and who has served them, longest first, each replica once.

        Args:
            keys: of one chain, from its first block on.
        """
        entries = self._entries
        found: list[Holders] = []
        for key in keys:
            holders = entries.get(key)
            if holders is None:
                break
            found.append(holders)
        seen: set[int] = set()
        previous: Holders = ()
        for depth in range(len(found), 0, -1):
            holders = found[depth - 1]
            if holders == previous:
                continue
            previous = holders
            fresh = [number for number in holders if number not in seen]
            seen.update(fresh)
            names = [self._names[number] for number in fresh if number in self._names]
            if names:
                yield depth, names

    def forget(self, name: str) -> None:
        """A replica is gone, and its blocks with it."""
        alone = self._numbers.pop(name, None)
        if alone is not None:
            del self._names[alone[0]]
