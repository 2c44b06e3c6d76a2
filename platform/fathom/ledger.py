"""The one account of compute: every layer-token run, head and KV byte is entered here.

Floating-point operations count a multiply and an add as two. One row through one layer costs

    2 * (matmul parameters of the layer) + 4 * heads * head_dim * (keys that the row sees)

and norms, RoPE and softmax are left out, as is usual.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from fathom.types import ComputeUsage


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """Unit costs of a model, split at its exit layer.

    Attributes:
        layer_params: matmul parameters of one layer. qkv_params: those of its projections.
        attention_width: heads * head_dim.
        kv_bytes: bytes of one token's keys and values in one layer.
        exit_layer, num_layers: k and L. exit_layers: M, those of the shallow path alone.
        exit_head_params, lm_head_params: matmul parameters of the heads.
    """

    layer_params: int
    qkv_params: int
    attention_width: int
    kv_bytes: int
    exit_layer: int
    num_layers: int
    exit_layers: int
    exit_head_params: int
    lm_head_params: int

    @property
    def deep_layers(self) -> int:
        """Layers of the deep stage."""
        return self.num_layers - self.exit_layer

    @property
    def exit_cost(self) -> float:
        """Multiply-adds of a token decided at the exit, as a share of one of the full model.

        Layers and head of the path up to where it is decided, at a short context: EERO's B_1 with
        two heads and B_2 = 1 (eero.md).
        """
        shallow = self.layer_params * (self.exit_layer + self.exit_layers) + self.exit_head_params
        return shallow / (self.layer_params * self.num_layers + self.lm_head_params)


class Ledger:
    """Enters each piece of work in a request's page and in the total."""

    def __init__(self, costs: ModelCosts) -> None:
        self.costs = costs
        self.total = ComputeUsage()

    def enter_rows(
        self,
        page: ComputeUsage,
        *,
        start: int,
        rows: int,
        first_decision: int,
        layers: int,
        deep: bool = False,
    ) -> None:
        """Enter one sequence's rows of one pass of a stage.

        Args:
            page: the request's page.
            start: position of the first row; rows: how many.
            first_decision: position of the sequence's first row that chooses a token.
            layers: that each row passes. deep: whether they are the deep stage's.
        """
        c = self.costs
        decisions = max(0, start + rows - max(start, first_decision))
        keys_seen = rows * start + rows * (rows + 1) // 2
        flops = layers * (2 * c.layer_params * rows + 4 * c.attention_width * keys_seen)
        for account in (page, self.total):
            account.prefill_layer_tokens += layers * (rows - decisions)
            if deep:
                account.deep_layer_tokens += layers * decisions
                account.flush_rows += rows
            else:
                account.shallow_layer_tokens += layers * decisions
            account.flops += flops
            account.kv_bytes_written += layers * c.kv_bytes * rows
            account.kv_bytes_read += layers * c.kv_bytes * (start + rows)

    def enter_copied_rows(self, page: ComputeUsage, rows: int) -> None:
        """Enter rows whose keys and values in the deep layers were projected from one state."""
        c = self.costs
        for account in (page, self.total):
            account.flops += 2 * c.qkv_params * c.deep_layers * rows
            account.kv_bytes_written += c.kv_bytes * c.deep_layers * rows

    def enter_exit_head(self, page: ComputeUsage, rows: int) -> None:
        """Enter rows through the exit head."""
        for account in (page, self.total):
            account.exit_head_rows += rows
            account.flops += 2 * self.costs.exit_head_params * rows

    def enter_lm_head(self, page: ComputeUsage, rows: int) -> None:
        """Enter rows through the LM head."""
        for account in (page, self.total):
            account.lm_head_rows += rows
            account.flops += 2 * self.costs.lm_head_params * rows

    def enter_meta(self, page: ComputeUsage, params: int) -> None:
        """Enter one row through a classifier of so many matmul parameters."""
        for account in (page, self.total):
            account.flops += 2 * params

    def enter_flush(self, pages: list[ComputeUsage]) -> None:
        """Enter one deep pass that served these requests."""
        self.total.flushes += 1
        for page in pages:
            page.flushes += 1

    def enter_draft(self, page: ComputeUsage) -> None:
        """Enter a token that the exit policy let go."""
        for account in (page, self.total):
            account.drafted += 1

    def enter_verdict(self, page: ComputeUsage, *, accepted: bool) -> None:
        """Enter what the deep stage says of a draft."""
        for account in (page, self.total):
            account.verified += 1
            account.accepted += accepted

    def enter_token(self, page: ComputeUsage, depth: int) -> None:
        """Enter a token of the output."""
        for account in (page, self.total):
            account.decided += 1
            account.exited += depth < self.costs.num_layers
            account.depth_sum += depth
            self._enter_realised(account)

    def enter_probe(self, page: ComputeUsage) -> None:
        """Enter an exit that went to the deep stage all the same."""
        for account in (page, self.total):
            account.probes += 1

    def enter_load_shift(self, page: ComputeUsage) -> None:
        """Enter a token of the output that was decided at a cheaper setting than asked for."""
        for account in (page, self.total):
            account.load_shifted += 1

    def enter_preemption(self, page: ComputeUsage) -> None:
        """Enter a sequence that will be recomputed."""
        for account in (page, self.total):
            account.preemptions += 1

    def enter_resumption(self, page: ComputeUsage, depths: Sequence[int]) -> None:
        """Enter a completion that goes on here, after tokens of these depths from elsewhere.

        They are tokens of its output, but none that this engine has made.
        """
        for account in (page, self.total):
            account.resumptions += 1
        page.decided += len(depths)
        page.exited += sum(depth < self.costs.num_layers for depth in depths)
        page.depth_sum += sum(depths)
        self._enter_realised(page)

    def _enter_realised(self, account: ComputeUsage) -> None:
        if account.decided:
            account.realised_budget = 1 - account.exit_rate * (1 - self.costs.exit_cost)

    def snapshot(self) -> ComputeUsage:
        """A copy of the totals since the engine started."""
        return dataclasses.replace(self.total)
