"""Captured passes give what eager ones give: padding changes nothing, and nothing is baked in.

A CUDA graph replays the operations of one run on the tensors of that run. ``Recording`` does the
same on a CPU: whatever Python computed while it recorded stays as it was then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fathom.attention.backend import SequenceRows
from fathom.attention.blocks import NULL_BLOCK
from fathom.attention.pool import KVPool
from fathom.attention.sdpa import SdpaBackend
from fathom.engine import measure
from fathom.engine.engine import Engine
from fathom.engine.graphs import BUCKETS, StageGraphs, Work, bucket_of
from fathom.engine.stage import Stage
from fathom.models.decoder import Decoder
from fathom.models.load import load_decoder
from fathom.types import AcceptMode, ComputePolicy
from tests.tiny_models import save_random_llama
from tests.unit.engine.conftest import request

SIZE, BLOCKS, LAYERS = 4, 60, (1, 3)


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for each in value for t in tensors(each)] if isinstance(value, list | tuple) else []


class Recording(TorchDispatchMode):
    """Notes operations with their tensors, and does them again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Callable, tuple, dict, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._done.append((func, args, kwargs or {}, tensors(out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, outs in self._done:
            for old, new in zip(outs, tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # a view or an output in place is there
                    old.copy_(new)


def capture(work: Work) -> Work:
    with Recording() as recording:
        out = work()

    def replay() -> torch.Tensor:
        recording.replay()
        return out

    return replay


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """In float16, which torch computes: our own kernels cannot be recorded."""
    path = save_random_llama(tmp_path_factory.mktemp("halves"), vocab_size=40)
    return load_decoder(path, dtype=torch.float16)


def new_stage(decoder: Decoder, make: Callable[[Work], Work] | None) -> Stage:
    config = decoder.config
    pool = KVPool(
        num_layers=LAYERS[1] - LAYERS[0],
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_blocks=BLOCKS,
        block_size=SIZE,
        dtype=decoder.dtype,
    )
    backend, graphs = SdpaBackend(), None
    if make is not None:
        graphs = StageGraphs(
            pool,
            backend,
            num_heads=config.num_heads,
            hidden_size=config.hidden_size,
            capture=make,
        )
    return Stage(decoder, *LAYERS, pool, backend, graphs=graphs)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Up to what float16 and these wide weights make of another order of the sums."""
    scale = float(b.float().abs().max())
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=1e-2 * scale + 1e-3)


# What each of 5 sequences runs in a pass: 0 rows, 1 as in decoding, a stack, or a prompt.
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    passes=st.lists(
        st.lists(st.sampled_from([0, 1, 1, 1, 3, 9]), min_size=5, max_size=5).filter(any),
        min_size=2,
        max_size=6,
    ),
    noting=st.booleans(),
)
def test_captured_passes_give_what_eager_ones_give(halves, passes, noting):
    eager, captured = new_stage(halves, None), new_stage(halves, capture)
    lengths = [0] * 5
    generator = torch.Generator().manual_seed(0)
    # A sequence's blocks lie apart; 12 of them hold 48 tokens.
    tables = [list(range(1 + s, 1 + s + 5 * 11 + 1, 5))[:11] for s in range(5)]
    for counts in passes:
        counts = [min(n, 44 - lengths[s]) for s, n in enumerate(counts)]
        rows = [
            SequenceRows(tables[s][: -(-(lengths[s] + n) // SIZE)], lengths[s], n)
            for s, n in enumerate(counts)
            if n
        ]
        if not rows:
            break
        lengths = [length + n for length, n in zip(lengths, counts, strict=True)]
        hidden = torch.randn(sum(counts), halves.config.hidden_size, generator=generator).half()
        before = hidden.clone()
        outs = [stage.run(stage.plan(rows), hidden, noting=noting) for stage in (eager, captured)]
        assert torch.equal(hidden, before)
        close(outs[1], outs[0])
    close(captured.pool.data, eager.pool.data)
    null = captured.pool.data[:, :, NULL_BLOCK * SIZE : (NULL_BLOCK + 1) * SIZE]
    assert not null.any()


def test_passes_of_one_bucket_are_captured_once(halves):
    made: list[Work] = []

    def counting(work: Work) -> Work:
        made.append(work)
        return capture(work)

    stage = new_stage(halves, counting)
    first = stage.plan([SequenceRows([1, 2], 0, 5)])
    second = stage.plan([SequenceRows([3, 4], 0, 7)])
    states = torch.randn(7, halves.config.hidden_size).half()
    outs = [stage.run(rows, states[:n]) for rows, n in ((first, 5), (second, 7), (first, 5))]
    assert len(made) == 1  # both are of bucket 8
    assert torch.equal(outs[0], outs[2])  # and each pass has its own layout, whoever came between
    stage.run(stage.plan([SequenceRows([5], 0, 1)]), states[:1])
    assert len(made) == 2


def test_prompts_and_what_cannot_be_captured_run_eagerly(halves, caplog):
    def fails(work: Work) -> Work:
        raise RuntimeError("operation not permitted when stream is capturing")

    eager, stage = new_stage(halves, None), new_stage(halves, fails)
    blocks = list(range(1, 51))
    states = torch.randn(BUCKETS[-1] + 1, halves.config.hidden_size).half()
    for rows in (SequenceRows(blocks, 0, 129), SequenceRows(blocks, 129, 2)):
        outs = [s.run(s.plan([rows]), states[: rows.num_rows]) for s in (eager, stage)]
        assert torch.equal(outs[0], outs[1])
    assert "cannot be captured" in caplog.text
    assert not stage.graphs.serves([SequenceRows([1], 0, 1)])


def test_buckets():
    assert [bucket_of(rows) for rows in (1, 2, 3, 9, 128, 129)] == [1, 2, 4, 16, 128, None]


@pytest.mark.parametrize("mode", [AcceptMode.FULL, AcceptMode.EXACT, AcceptMode.FREE])
def test_an_engine_of_captured_passes_gives_the_same_tokens(
    make_engine, exit_adapter, monkeypatch: pytest.MonkeyPatch, mode: AcceptMode
) -> None:
    """The runner is eager here: tables, padding and the pool are what is tested."""

    def tokens(engine: Engine) -> dict[str, list[int]]:
        compute = ComputePolicy(mode=mode, exit_threshold=0.2)
        for index in range(5):
            engine.add_request(request(str(index), range(3, 8 + 3 * index), compute))
        found: dict[str, list[int]] = {}
        while engine.has_work():
            for output in engine.step():
                found.setdefault(output.request_id, []).extend(t.id for t in output.tokens)
        engine.check_integrity()
        return found

    expected = tokens(make_engine(trained=exit_adapter, attention="sdpa"))

    def graphs_for(pool, backend, *, num_heads, hidden_size):
        return StageGraphs(
            pool,
            backend,
            num_heads=num_heads,
            hidden_size=hidden_size,
            capture=lambda work: work,
        )

    monkeypatch.setattr(measure, "graphs_for", graphs_for)
    engine = make_engine(trained=exit_adapter, attention="sdpa")
    assert engine._shallow._stage.graphs is not None
    assert tokens(engine) == expected
    assert engine._shallow._stage.graphs._buckets
