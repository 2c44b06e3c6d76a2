"""When requests are sent: all at once, or at a rate, evenly or in bursts."""

from __future__ import annotations

import math
import random


def arrival_times(
    count: int, rate: float, *, burstiness: float = 1.0, seed: int = 0
) -> list[float]:
    """Seconds from the start at which requests are sent, ascending.

    Intervals are drawn from a gamma distribution of mean 1 / rate and shape ``burstiness``: 1 makes
    a Poisson process, less is burstier, more is more even, infinity is a metronome. As in vLLM's
    ``bench serve``, times are scaled so that the last one is count / rate, whatever was drawn.

    Args:
        rate: requests a second; infinity sends all at once.

    Raises:
        ValueError: for a rate or a burstiness that is not above 0.
    """
    if not rate > 0 or not burstiness > 0:
        raise ValueError(f"rate and burstiness must be above 0, got {rate} and {burstiness}.")
    if math.isinf(rate) or not count:
        return [0.0] * count
    if math.isinf(burstiness):
        return [number / rate for number in range(1, count + 1)]
    draw = random.Random(seed)
    times: list[float] = []
    now = 0.0
    for _ in range(count):
        now += draw.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    if not times[-1]:  # so bursty that every draw was as good as 0
        return [count / rate] * count
    return [each * (count / rate / times[-1]) for each in times]
