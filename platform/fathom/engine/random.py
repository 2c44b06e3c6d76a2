"""Counter-based random draws: the same seed and token give the same draw in every batch."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Draw(IntEnum):
    """What a draw is for: each purpose has a stream of its own."""

    DRAFT = 0
    DEEP = 1
    ACCEPT = 2
    RESAMPLE = 3
    FORCED_EXIT = 4
    PROBE = 5


def uniform(seed: int, position: int, epoch: int, purpose: Draw) -> float:
    """One draw from [0, 1) by Philox (Salmon et al., 2011).

    Args:
        seed: the sequence's seed, any integer.
        position: position of the row that decides.
        epoch: how many tokens of the sequence the deep stage has chosen. A position that is decided
            again after a cut must draw afresh: which way it was decided first may have depended on
            the old draw, and reusing it would bias ``exact`` sampling. A cut comes with a token of
            the deep stage; counting those, and not the cuts, lets a sequence that goes on in
            another engine draw what it would have drawn (see ``resume``).
        purpose: what for.
    """
    key = np.array([seed % 2**64, int(purpose)], dtype=np.uint64)
    counter = np.array([0, position, epoch, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(counter=counter, key=key)).random())
