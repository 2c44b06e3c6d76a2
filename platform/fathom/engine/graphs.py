"""Passes of a stage as CUDA graphs: captured once a row bucket, replayed from then on.

A stage runs its layers at one depth for all rows, so that a pass of so many rows is always the same
work. Rows are filled up to a bucket with padding, which writes to the null block. What does not fit
a bucket (prompts), and everything where capturing fails, runs eagerly.

Nothing but ``CudaCapture`` needs a GPU: the rest is tested on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from fathom.attention.backend import SequenceRows
from fathom.attention.fixed import FixedBackend, FixedPass, clear_null_block, width_of
from fathom.attention.pool import KVPool

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows of captured passes."""

Work = Callable[[], torch.Tensor]
"""Runs on fixed buffers; gives what a call computes."""

Layers = Callable[[torch.Tensor, FixedPass], torch.Tensor]
"""Runs layers over [rows, d] of a fixed pass."""

_WARM_UPS = 3
_log = logging.getLogger(__name__)


def bucket_of(rows: int) -> int | None:
    """The smallest bucket that holds so many rows; None for more than any does."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), None)


class CudaCapture:
    """Turns work on fixed buffers into a CUDA graph's replay.

    All graphs share one memory pool: what a replay gives has to be copied before the next one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Capture ``work``, which is run a few times before.

        Raises:
            RuntimeError: if it cannot be captured, or its replay gives something else.
        """
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                expected = work()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = work()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        found = replay()
        if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2, equal_nan=True):
            off = float((found - expected).abs().max())
            raise RuntimeError(f"a captured pass is off by {off:.3g} from the eager one")
        return replay


class _Bucket:
    """A fixed pass, its input, and what was captured over it."""

    def __init__(self, rows: FixedPass, width: int, pool: KVPool) -> None:
        self.rows = rows
        data = pool.data
        self.hidden = torch.zeros(rows.num_rows, width, dtype=data.dtype, device=data.device)
        self.captured: dict[object, Work] = {}
        self.laid_out: Sequence[SequenceRows] | None = None


class StageGraphs:
    """Runs the passes of one stage as captured work.

    Args:
        pool: the stage's. backend: its attention. num_heads: query heads.
        hidden_size: d. capture: makes a replay of work, see ``CudaCapture``.
    """

    def __init__(
        self,
        pool: KVPool,
        backend: FixedBackend,
        *,
        num_heads: int,
        hidden_size: int,
        capture: Callable[[Work], Work],
    ) -> None:
        self._pool = pool
        self._backend = backend
        self._num_heads = num_heads
        self._hidden_size = hidden_size
        self._capture = capture
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._failed = False

    def serves(self, sequences: Sequence[SequenceRows]) -> bool:
        """Whether a pass over these rows runs as captured work."""
        rows = sum(each.num_rows for each in sequences)
        return not self._failed and bucket_of(rows) is not None

    @torch.inference_mode()
    def run(
        self,
        sequences: Sequence[SequenceRows],
        hidden: torch.Tensor,
        key: object,
        layers: Layers,
    ) -> torch.Tensor | None:
        """Run layers over the rows of a pass that ``serves``.

        Args:
            sequences: the rows, which nobody changes. hidden: [rows, d].
            key: of the layers: equal keys are equal work.

        Returns:
            [rows, d], the caller's own; None if this work cannot be captured: run it eagerly.
        """
        if self._failed:
            return None
        bucket = self._bucket(len(hidden), width_of(sequences, self._pool.block_size))
        if bucket.laid_out is not sequences:
            bucket.rows.fill(sequences)
            bucket.laid_out = sequences
        bucket.hidden[: len(hidden)].copy_(hidden)
        bucket.hidden[len(hidden) :].zero_()
        work = bucket.captured.get(key)
        if work is None:

            def all_rows() -> torch.Tensor:
                out = layers(bucket.hidden, bucket.rows)
                clear_null_block(self._pool)
                return out

            try:
                work = bucket.captured[key] = self._capture(all_rows)
            except RuntimeError as error:
                _log.warning("passes run eagerly: CUDA graphs cannot be captured: %s", error)
                self._failed = True
                self._buckets.clear()
                return None
        return work()[: len(hidden)].clone()

    def _bucket(self, rows: int, width: int) -> _Bucket:
        size = bucket_of(rows)
        assert size is not None
        found = self._buckets.get((size, width))
        if found is None:
            fixed = self._backend.fixed(size, width, self._pool, self._num_heads)
            found = _Bucket(fixed, self._hidden_size, self._pool)
            self._buckets[size, width] = found
        return found


def graphs_for(
    pool: KVPool, backend: object, *, num_heads: int, hidden_size: int
) -> StageGraphs | None:
    """Captured passes for a stage; None off the GPU, or where its attention has no fixed ones."""
    if not pool.data.is_cuda or not isinstance(backend, FixedBackend):
        return None
    return StageGraphs(
        pool,
        backend,
        num_heads=num_heads,
        hidden_size=hidden_size,
        capture=CudaCapture(pool.data.device),
    )
