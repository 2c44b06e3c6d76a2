"""What a drill kills, and when: decided by its seed before anything runs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fathom.config import ServeConfig, Topology


@dataclass(frozen=True, slots=True)
class Blow:
    """One kill to come.

    Attributes:
        after_s: seconds after the kill before it, or after the start.
        kind: of process. draw: in [0, 1), which of those that live then.
    """

    after_s: float
    kind: str
    draw: float

    def choose(self, names: Sequence[str]) -> str:
        """The one of ``names`` that it hits, whatever their order."""
        return sorted(names)[int(self.draw * len(names))]


def blows(seed: int, kinds: Sequence[str], every_s: float) -> Iterator[Blow]:
    """The kills of a drill, without end: a function of the arguments alone.

    Kinds come in rounds, each in an order of its own, so that a short drill meets every kind. The
    time between two kills is uniform in [0.5, 1.5] times ``every_s``: at equal steps the kills
    could always meet requests at the same stage.
    """
    numbers = random.Random(f"fathom chaos {seed}")
    while True:
        for kind in numbers.sample(kinds, len(kinds)):
            yield Blow(every_s * numbers.uniform(0.5, 1.5), kind, numbers.random())


def kinds_of(config: ServeConfig) -> list[str]:
    """The kinds of process of an application that a drill can kill.

    ``directory`` is a shard of the KV store, ``journal`` the keeper of streams.
    """
    behind = ["shallow", "deep"] if config.topology is Topology.DISAGGREGATED else ["engine"]
    return ["ingress", *behind, *(["directory"] if config.store_shards else []), "journal"]
