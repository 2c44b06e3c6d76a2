"""Collected rows as they are read back for training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fathom.training.errors import TrainingError


@dataclass(slots=True)
class Rows:
    """Rows of one domain for one exit layer, in sequence order.

    Attributes:
        hidden: [n, d] bfloat16, states after layer k. final: [n, d] bfloat16, final-normed states.
        argmax: [n] int64, the token the whole model chose. sequence: [n] int64, unique a sequence.
    """

    hidden: Tensor
    final: Tensor
    argmax: Tensor
    sequence: Tensor

    def take(self, index: Tensor) -> Rows:
        """The rows at ``index`` (mask or positions)."""
        return Rows(self.hidden[index], self.final[index], self.argmax[index], self.sequence[index])


def join(parts: Sequence[Rows]) -> Rows:
    """One after another; sequence numbers must already be distinct."""
    return Rows(
        torch.cat([p.hidden for p in parts]),
        torch.cat([p.final for p in parts]),
        torch.cat([p.argmax for p in parts]),
        torch.cat([p.sequence for p in parts]),
    )


def load_rows(work_dir: Path, split: str, k: int) -> dict[str, Rows]:
    """Collected rows of layer k by domain; split is ``train`` or ``heldout``.

    Raises:
        TrainingError: when nothing has been collected.
    """
    paths = sorted(work_dir.glob(f"{split}-*.safetensors"))
    if not paths:
        raise TrainingError(f"{work_dir} holds no {split} rows: collect first.")
    parts: dict[str, list[Rows]] = {}
    for number, path in enumerate(paths):
        with safe_open(path, framework="pt") as shard:
            rows = Rows(
                shard.get_tensor(f"hidden.{k}"),
                shard.get_tensor("hidden.0"),
                shard.get_tensor("argmax").long(),
                # Shards number their sequences from 0; far fewer than 10,000 lie in one.
                shard.get_tensor("sequence").long() + 10_000 * number,
            )
            parts.setdefault(shard.metadata()["domain"], []).append(rows)
    return {domain: join(rows) for domain, rows in parts.items()}


def split_validation(rows: Rows) -> tuple[Rows, Rows]:
    """Training and validation rows: every tenth sequence validates (for early stopping only)."""
    rank = torch.unique(rows.sequence, return_inverse=True)[1]
    chosen = rank % 10 == 9
    return rows.take(~chosen), rows.take(chosen)
