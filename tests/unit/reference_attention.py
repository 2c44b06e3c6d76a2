"""The oracle for attention over ragged rows: contiguous keys and values, one sequence at a time."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class ContiguousAttention:
    """A plain, slow ``attend`` (see ``fathom.models.decoder.Attend``) that computes in float32.

    Say with ``set_rows`` whose rows a pass holds, then give the object to ``Decoder.run``. A row
    that is written again at its position replaces what was there.

    Args:
        num_heads, num_kv_heads: H and Hkv.
    """

    def __init__(self, num_heads: int, num_kv_heads: int) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        # (layer, sequence) -> position -> [2 * Hkv, D]
        self.kv: dict[tuple[int, int], dict[int, Tensor]] = defaultdict(dict)
        self.rows: list[tuple[int, int]] = []

    def set_rows(self, sequence_ids: list[int], positions: list[int]) -> None:
        """Name the sequence and the position of every row of the next pass."""
        self.rows = list(zip(sequence_ids, positions, strict=True))

    def truncate(self, sequence_id: int, length: int) -> None:
        """Forget a sequence's keys and values at positions >= length, in all layers."""
        for (_, sequence), cache in self.kv.items():
            if sequence == sequence_id:
                for position in [p for p in cache if p >= length]:
                    del cache[position]

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """q [rows, H, D], kv [rows, 2 * Hkv, D] -> [rows, H * D], causal within each sequence."""
        assert q.shape[0] == kv.shape[0] == len(self.rows)
        assert q.shape[1] == self.num_heads and kv.shape[1] == 2 * self.num_kv_heads
        for row, (sequence, position) in enumerate(self.rows):
            self.kv[layer, sequence][position] = kv[row].float().clone()
        outputs = [
            self._attend(q[row].float(), self.kv[layer, sequence], position)
            for row, (sequence, position) in enumerate(self.rows)
        ]
        return torch.stack(outputs).to(q.dtype)

    def _attend(self, q: Tensor, cache: dict[int, Tensor], position: int) -> Tensor:
        kv = torch.stack([cache[p] for p in range(position + 1)])
        group = self.num_heads // self.num_kv_heads
        keys = kv[:, : self.num_kv_heads].repeat_interleave(group, 1)
        values = kv[:, self.num_kv_heads :].repeat_interleave(group, 1)
        scores = torch.einsum("hd,thd->ht", q, keys) / q.shape[-1] ** 0.5
        return torch.einsum("ht,thd->hd", scores.softmax(-1), values).flatten()
