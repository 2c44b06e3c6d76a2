"""What the cluster benchmark counts, and what it refuses to count."""

from __future__ import annotations

import random

import pytest

from fathom.bench.exchange import measure_exchange, summarize
from fathom.bench.prefix import FirstToken, measure_prefix
from fathom.bench.throughput import BenchError, bodies_of
from fathom.config import EngineConfig
from fathom.dataplane.client import Timing
from fathom.types import AcceptMode, ComputePolicy
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]


def timing(total_ms: float, pass_ms: float, rows: int, sequences: int) -> Timing:
    return Timing(total_ms / 1e3, pass_ms / 1e3, 0.0, rows, sequences)


def test_only_decoding_flushes_of_all_sequences_count() -> None:
    found = summarize(
        [
            timing(11, 10, 8, 8),
            timing(13, 10, 16, 8),
            timing(12, 10, 8, 8),
            timing(99, 10, 400, 8),  # prompts
            timing(99, 10, 7, 7),
        ],
        sequences=8,
        most_rows=9,
    )
    assert found is not None
    assert found.overhead_ms == pytest.approx(2.0)
    assert (found.flushes, found.rows) == (3, 8)
    assert summarize([timing(1, 1, 2, 2)], sequences=8, most_rows=9) is None


@pytest.mark.slow
def test_a_flush_is_timed_between_two_processes(tiny_model) -> None:
    config = EngineConfig(
        model=str(tiny_model), dtype="float32", threads=1, kv_cache_bytes=1 << 20, max_num_seqs=4
    )
    prompts = [(5, 6, 7), (8, 9), (10, 11, 12)]
    runs = list(
        measure_exchange(
            config, ComputePolicy(mode=AcceptMode.FULL), prompts, new_tokens=12, runs=2
        )
    )
    assert len(runs) == 2
    for run in runs:
        # All three decode together; prompts and the last token are other flushes.
        assert run.flushes >= 8
        assert run.rows == 3
        assert 0 < run.overhead_ms < 1000
        assert run.pass_ms > 0


class Remembering:
    """A replica that is quick with prompts that its store knows."""

    def __init__(self, store: set[tuple[int, ...]], odd: int = 0) -> None:
        self.store = store
        self.odd = odd
        self.asked: list[tuple[int, ...]] = []

    def first_token(self, prompt) -> FirstToken:
        key = tuple(prompt)
        self.asked.append(key)
        seconds = 0.1 if key in self.store else 1.0
        self.store.add(key)
        return FirstToken(random.Random(repr(key)).randrange(100) + self.odd, seconds)


def test_each_run_has_a_prefix_of_its_own_and_replicas_take_turns() -> None:
    store: set[tuple[int, ...]] = set()
    pair = (Remembering(store), Remembering(store))
    runs = list(measure_prefix(pair, lambda: len(store), prefix_tokens=20, vocab_size=50, runs=2))
    assert [run.ratio for run in runs] == pytest.approx([0.1, 0.1])
    assert pair[0].asked == pair[1].asked
    assert len(set(pair[0].asked)) == 3
    assert all(len(prompt) == 21 for prompt in pair[0].asked)


def test_a_wrong_first_token_is_no_measurement() -> None:
    store: set[tuple[int, ...]] = set()
    pair = (Remembering(store), Remembering(store, odd=1))
    with pytest.raises(BenchError, match="the first token is"):
        list(measure_prefix(pair, lambda: len(store), prefix_tokens=4, vocab_size=9, runs=1))


def test_runs_do_not_share_prefixes() -> None:
    one, other = (bodies_of("m", "exact", 14, 8, salt) for salt in ("a", "b"))
    assert len(one) == 14
    assert {body["cache_salt"] for body in one} == {"a"}
    assert [b["messages"] for b in one] == [b["messages"] for b in other]
    assert all(body["ignore_eos"] and body["max_tokens"] == 8 for body in one)
