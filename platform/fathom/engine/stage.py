"""One stage in this process: a layer range, its paged KV cache and its attention backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fathom.attention.backend import AttentionBackend, RaggedBatch, SequenceRows
from fathom.attention.paged_cache import PagedKVCache
from fathom.models.decoder import Decoder


class Stage:
    """Runs layers [first, last) over ragged rows.

    Attributes:
        cache: the stage's KV cache; who schedules the rows makes room in it first.
    """

    def __init__(
        self,
        decoder: Decoder,
        first: int,
        last: int,
        cache: PagedKVCache,
        backend: AttentionBackend,
    ) -> None:
        self.decoder = decoder
        self.first = first
        self.last = last
        self.cache = cache
        self._backend = backend

    def run(self, sequences: Sequence[SequenceRows], hidden: torch.Tensor) -> torch.Tensor:
        """Run all layers of the stage.

        Args:
            sequences: which rows belong to whom, in row order; the cache has room for them.
            hidden: [rows, d], input of the first layer.

        Returns:
            [rows, d], output of the last layer.
        """
        batch = RaggedBatch.build(sequences, self.cache)
        attend = self._backend.plan(batch, self.cache, self.decoder.config.num_heads)
        first = self.first
        return self.decoder.run(
            hidden,
            batch.positions,
            self.first,
            self.last,
            lambda layer, q, kv: attend(layer - first, q, kv),
        )
