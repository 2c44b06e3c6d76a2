"""Timing the stages as they are built: what the flush rule decides by."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from fathom.attention.backend import SequenceRows
from fathom.attention.choice import choose_backend
from fathom.attention.pool import KVPool
from fathom.config import EngineConfig
from fathom.engine.costs import PROBE_ROWS, CostCurve, StageCosts
from fathom.engine.graphs import graphs_for
from fathom.engine.stage import Stage
from fathom.models.decoder import Decoder

_PROBE_CONTEXT = 64
"""Keys that rows see while stage costs are measured."""

_PROBE_SEQUENCES = 8


class Running(NamedTuple):
    """How stages run: the fields of ``EngineConfig`` of these names."""

    attention: str = "auto"
    cuda_graphs: bool = True
    compile: bool = False

    @classmethod
    def of(cls, config: EngineConfig) -> Running:
        """What the settings say."""
        return cls(config.attention, config.cuda_graphs, config.compile)


class Scorer(Protocol):
    """What is timed of an exit head."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See ``ExitHead.logits``."""
        ...


def new_stage(
    decoder: Decoder,
    layers: tuple[int, int],
    num_blocks: int,
    block_size: int,
    exit_layers: Decoder | None = None,
    runs: Running = Running(),
) -> Stage:
    """A stage of the layers [first, last) with a pool of its own.

    Raises:
        ConfigError: for an attention backend that cannot run it.
        ModelError: for layers that cannot be compiled.
    """
    first, last = layers
    pool = KVPool(
        num_layers=last - first + (len(exit_layers.layers) if exit_layers else 0),
        num_kv_heads=decoder.config.num_kv_heads,
        head_dim=decoder.config.head_dim,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=decoder.dtype,
        device=decoder.device,
    )
    backend = choose_backend(runs.attention, pool, decoder.config.num_heads)
    if runs.compile:
        for own in (decoder, exit_layers):
            if own is not None:
                own.compile()
    graphs = None
    if runs.cuda_graphs:
        graphs = graphs_for(
            pool,
            backend,
            num_heads=decoder.config.num_heads,
            hidden_size=decoder.config.hidden_size,
        )
    return Stage(decoder, first, last, pool, backend, exit_layers, graphs)


def measure_stage_costs(
    decoder: Decoder,
    head: Scorer,
    exit_layer: int,
    block_size: int,
    max_rows: int,
    exit_layers: Decoder | None = None,
    runs: Running = Running(),
) -> StageCosts:
    """Time both stages of a model that is here whole; see ``measure_shallow``."""
    shallow, shallow_full = measure_shallow(
        decoder, head, exit_layer, block_size, max_rows, exit_layers, runs
    )
    deep = measure_deep(decoder, exit_layer, block_size, max_rows, runs)
    return StageCosts(shallow=shallow, shallow_full=shallow_full, deep=deep)


def measure_shallow(
    decoder: Decoder,
    head: Scorer,
    exit_layer: int,
    block_size: int,
    max_rows: int,
    exit_layers: Decoder | None = None,
    runs: Running = Running(),
) -> tuple[CostCurve, CostCurve]:
    """Time the shallow stage at a few row counts, over up to 8 sequences with a short context.

    Returns:
        the costs to the exit head's logits, and those of the layers [0, k) alone.
    """
    probe = _Probe(decoder, (0, exit_layer), block_size, max_rows, exit_layers, runs)
    return (
        probe.time(lambda rows: head.logits(probe.run(rows, to_exit=True))),
        probe.time(probe.run),
    )


def measure_deep(
    decoder: Decoder, exit_layer: int, block_size: int, max_rows: int, runs: Running = Running()
) -> CostCurve:
    """Time the deep stage with the LM head; see ``measure_shallow``."""
    layers = (exit_layer, decoder.config.num_layers)
    probe = _Probe(decoder, layers, block_size, max_rows, runs=runs)
    return probe.time(lambda rows: decoder.logits(probe.run(rows)))


class _Probe:
    """A stage to be timed, on a pool of its own: the serving pool may be smaller."""

    def __init__(
        self,
        decoder: Decoder,
        layers: tuple[int, int],
        block_size: int,
        max_rows: int,
        exit_layers: Decoder | None = None,
        runs: Running = Running(),
    ) -> None:
        self._counts = tuple(rows for rows in PROBE_ROWS if rows <= max_rows)
        longest = _PROBE_CONTEXT + self._counts[-1]
        num_blocks = 1 + _PROBE_SEQUENCES * -(-longest // block_size)
        self._blocks_each = num_blocks // _PROBE_SEQUENCES
        self._stage = new_stage(decoder, layers, num_blocks, block_size, exit_layers, runs)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(self._counts[-1], decoder.config.hidden_size, generator=generator)
        self._hidden = states.to(decoder.device, decoder.dtype)

    def run(self, rows: int, *, to_exit: bool = False) -> torch.Tensor:
        """One pass."""
        sequences = min(rows, _PROBE_SEQUENCES)
        batch = []
        for index in range(sequences):
            first = 1 + index * self._blocks_each
            blocks = range(first, first + self._blocks_each)
            batch.append(SequenceRows(blocks, _PROBE_CONTEXT, rows // sequences))
        own = self._stage.plan(batch)
        out = self._stage.run(own, self._hidden[:rows])
        return self._stage.run_exit_layers(own, out) if to_exit else out

    def time(self, run: Callable[[int], torch.Tensor]) -> CostCurve:
        """The costs of ``run`` by rows."""
        return CostCurve.measure(lambda rows: _finish(run(rows)), self._counts)


def _finish(result: torch.Tensor) -> None:
    """Wait for a result: a GPU answers before it is done."""
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
