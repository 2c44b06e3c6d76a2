"""One stage in this process: a layer range, its KV pool and its attention backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fathom.attention.backend import Attend, AttentionBackend, RaggedBatch, SequenceRows
from fathom.attention.fixed import FixedPass
from fathom.attention.paged import PagedPass
from fathom.attention.pool import KVPool
from fathom.engine.graphs import StageGraphs
from fathom.models.decoder import Decoder
from fathom.models.fused import fuse


@dataclass(frozen=True, slots=True)
class EagerRows:
    """Rows laid out for an eager run: their positions, [rows] int64, and attention over them."""

    positions: torch.Tensor
    attend: Attend


@dataclass(slots=True)
class Pass:
    """The rows of one pass: of whom they are, and their layout once an eager run needs it."""

    sequences: Sequence[SequenceRows]
    eager: EagerRows | None = None


class Stage:
    """Runs layers [first, last) over ragged rows.

    Attributes:
        pool: keys and values. Who schedules the rows says which blocks are whose.
        exit_layers: layers [last, last + M) of the shallow path alone, or None. Their keys and
            values lie in the same pool, behind those of the stage's own layers.
        backend: computes attention. graphs: runs passes of few rows captured, or None.
    """

    def __init__(
        self,
        decoder: Decoder,
        first: int,
        last: int,
        pool: KVPool,
        backend: AttentionBackend,
        exit_layers: Decoder | None = None,
        graphs: StageGraphs | None = None,
    ) -> None:
        self.decoder = decoder
        self.first = first
        self.last = last
        self.pool = pool
        self.exit_layers = exit_layers
        self.backend = backend
        self.graphs = graphs
        self._fused = {decoder: fuse(decoder, first, last)}
        if exit_layers is not None:
            self._fused[exit_layers] = fuse(exit_layers, exit_layers.first, exit_layers.last)

    def plan(self, sequences: Sequence[SequenceRows]) -> Pass:
        """Lay out the rows of a pass, once for all layers.

        Args:
            sequences: which rows belong to whom, in row order.
        """
        rows = Pass(sequences)
        if self.graphs is None or not self.graphs.serves(sequences):
            self._lay_out(rows)
        return rows

    def run(self, rows: Pass, hidden: torch.Tensor, *, noting: bool = False) -> torch.Tensor:
        """Run all layers of the stage.

        Args:
            hidden: [rows, d], input of the first layer.
            noting: whether the input of the last layer is wanted as well.

        Returns:
            [rows, d], output of the last layer; if ``noting`` [rows, 2 * d], with its input behind.
        """
        return self._layers(self.decoder, self.first, self.last, rows, hidden, noting)

    def run_exit_layers(
        self, rows: Pass, hidden: torch.Tensor, *, noting: bool = False
    ) -> torch.Tensor:
        """Run the layers that only the shallow path has; see ``run``."""
        if self.exit_layers is None:
            return hidden
        own = self.exit_layers
        return self._layers(own, own.first, own.last, rows, hidden, noting)

    def copy_states(self, sequences: Sequence[SequenceRows], hidden: torch.Tensor) -> None:
        """Fill the pool as if no layer of the stage changed the state (CALM).

        Args:
            sequences: as in ``plan``. hidden: [rows, d], output of the layer before the stage.
        """
        batch = RaggedBatch.build(sequences, self.pool)
        self.decoder.project_kv(
            hidden,
            batch.positions,
            self.first,
            self.last,
            lambda layer, kv: self.pool.write(layer - self.first, batch.slots, kv),
        )

    def _lay_out(self, rows: Pass) -> EagerRows:
        if rows.eager is None:
            batch = RaggedBatch.build(rows.sequences, self.pool)
            attend = self.backend.plan(batch, self.pool, self.decoder.config.num_heads)
            rows.eager = EagerRows(batch.positions, attend)
        return rows.eager

    def _layers(
        self,
        decoder: Decoder,
        first: int,
        last: int,
        rows: Pass,
        hidden: torch.Tensor,
        noting: bool,
    ) -> torch.Tensor:
        offset, fused = self.first, self._fused[decoder]

        def run_eagerly(hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
            eager = self._lay_out(rows)
            positions, attend = eager.positions, eager.attend
            if fused is not None and isinstance(attend, PagedPass):
                return fused.run(hidden, positions, first, last, attend, first - offset)
            return decoder.run(
                hidden,
                positions,
                first,
                last,
                lambda layer, q, kv: attend(layer - offset, q, kv),
            )

        def run(hidden: torch.Tensor, first: int, last: int) -> torch.Tensor:
            graphs = self.graphs
            if graphs is None or not graphs.serves(rows.sequences):
                return run_eagerly(hidden, first, last)

            def layers(hidden: torch.Tensor, fixed: FixedPass) -> torch.Tensor:
                return decoder.run(
                    hidden,
                    fixed.positions,
                    first,
                    last,
                    lambda layer, q, kv: fixed.attend(layer - offset, q, kv),
                )

            out = graphs.run(rows.sequences, hidden, (decoder, first, last), layers)
            return run_eagerly(hidden, first, last) if out is None else out

        if not noting:
            return run(hidden, first, last)
        earlier = run(hidden, first, last - 1)
        return torch.cat([run(earlier, last - 1, last), earlier], dim=1)
