from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.bench.measure import Run, groups, median_ratio, percentile, run_interleaved


class Counting:
    """A contender that answers every prompt with its own tokens, and notes when it ran."""

    def __init__(self, engine: str, mode: str, log: list[tuple[str, int, int]]) -> None:
        self.engine, self.mode, self._log = engine, mode, log

    def run(self, prompts, batch: int, new_tokens: int) -> Run:
        self._log.append((self.mode, batch, new_tokens))
        return Run(seconds=2.0, token_ids=[[1] * new_tokens for _ in prompts])


@given(st.lists(st.integers(), min_size=1, max_size=20), st.integers(1, 9))
def test_groups_are_full_and_begin_with_the_prompts(values: list[int], batch: int) -> None:
    prompts = [(value,) for value in values]
    found = list(groups(prompts, batch))
    assert all(len(group) == batch for group in found)
    flat = [prompt for group in found for prompt in group]
    assert len(flat) - len(prompts) < batch
    assert all(prompt == prompts[i % len(prompts)] for i, prompt in enumerate(flat))


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles(values: list[float]) -> None:
    assert percentile(values, 0) == min(values)
    assert percentile(values, 100) == max(values)
    assert percentile(values, 50) == pytest.approx(statistics.median(values))


def test_percentile_of_nothing() -> None:
    assert percentile([], 50) is None


def test_rounds_are_interleaved_after_a_warm_up() -> None:
    log: list[tuple[str, int, int]] = []
    contenders = [Counting("fathom", "full", log), Counting("fathom", "free", log)]
    prompts = [(1,), (2,)]
    results = list(run_interleaved(contenders, prompts, [1, 2], new_tokens=9, runs=2))
    one_round = [("full", 1, 9), ("free", 1, 9), ("full", 2, 9), ("free", 2, 9)]
    assert log == [(mode, batch, 4) for mode, batch, _ in one_round] + one_round * 2
    assert [(c.mode, batch) for c, batch, _ in results] == [(m, b) for m, b, _ in one_round * 2]
    assert all(result.tokens_per_s == 9 for _, _, result in results)


def test_a_slow_round_cancels_out_of_the_ratio() -> None:
    full = [10.0, 5.0, 10.0]
    free = [20.0, 10.0, 20.0]
    assert median_ratio(free, full) == 2.0
    assert median_ratio(free, []) is None


def test_times_of_a_request() -> None:
    run = Run()
    run.time_tokens(1.0, [1.5, 1.6, 1.9])
    run.time_tokens(1.0, [3.0])
    assert run.ttft == [0.5, 2.0]
    assert run.tpot == [pytest.approx(0.2)]
