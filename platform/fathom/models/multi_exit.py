"""Classifiers with an exit head after every stage of their encoder.

Three things are kept apart. ``MultiExit.cascade`` runs: it knows which rows are active, and asks
``decide`` which of them leave. What decides is ``fathom.exits.budget``. ``cumulative_flops`` is the
account: what it costs to have been seen by head m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fathom.models.encoders.base import Encoder, ExitHead, Flops
from fathom.models.encoders.bert import Bert, BertConfig
from fathom.models.encoders.resnet import ResNet
from fathom.models.errors import ModelError

Decide = Callable[[int, Tensor, Tensor], Tensor]
"""Head m (from 0), rows asked [active] int64 and their logits [active, K] float32 -> [active] bool,
True for those that leave with this head's answer. The last head is not asked: everybody leaves."""


class MultiExit(nn.Module):
    """An encoder in M stages with a head after each.

    Args:
        classes: K. hidden: width of the heads' hidden layer; 0 for linear heads.
    """

    def __init__(self, encoder: Encoder, classes: int, hidden: int = 0) -> None:
        super().__init__()
        self.encoder = encoder
        self.classes, self.hidden = classes, hidden
        self.heads = nn.ModuleList(
            encoder.make_head(index, classes, hidden) for index in range(encoder.num_stages)
        )

    @property
    def num_heads(self) -> int:
        """M."""
        return len(self.heads)

    def features(self, inputs: Any, sizes: Tensor) -> list[Tensor]:
        """What each head reads; see ``Encoder.begin`` for the arguments."""
        state = self.encoder.begin(inputs, sizes)
        found = []
        for index in range(self.num_heads):
            state = self.encoder.stage(index, state)
            found.append(self.encoder.feature(index, state))
        return found

    def forward(self, inputs: Any, sizes: Tensor) -> Tensor:
        """Every head's logits for every row, [rows, M, K] float32; nobody leaves."""
        features = self.features(inputs, sizes)
        return self.read(features)

    def read(self, features: list[Tensor]) -> Tensor:
        """Logits [rows, M, K] float32 of features that were kept."""
        return torch.stack(
            [head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1
        )

    @torch.inference_mode()
    def cascade(self, inputs: Any, sizes: Tensor, decide: Decide) -> tuple[Tensor, Tensor]:
        """Run each row as far as ``decide`` wants: a stage sees only the rows still active.

        Args:
            inputs, sizes: see ``Encoder.begin``; at least one row.
            decide: see ``Decide``.

        Returns:
            the head that answered, [rows] int64 from 0; its logits, [rows, K] float32.
        """
        rows = torch.arange(len(sizes))
        head_of = torch.full((len(sizes),), self.num_heads - 1)
        logits_of = torch.empty(len(sizes), self.classes)
        state = self.encoder.begin(inputs, sizes)
        for index, head in enumerate(self.heads):
            state = self.encoder.stage(index, state)
            logits = head(self.encoder.feature(index, state))
            if index == self.num_heads - 1:
                logits_of[rows] = logits
                break
            leaves = decide(index, rows, logits)
            head_of[rows[leaves]] = index
            logits_of[rows[leaves]] = logits[leaves]
            stays = (~leaves).nonzero().flatten()
            if not len(stays):
                break
            if len(stays) < len(rows):
                rows, state = rows[stays], self.encoder.narrow(state, stays)
        return head_of, logits_of

    def cumulative_flops(self, sizes: NDArray[np.int64]) -> Flops:
        """B_m of rows that the heads 1..m were asked about (eero.md): stages and heads up to m.

        Args:
            sizes: [rows] int64, see ``Encoder``.

        Returns:
            [rows, M] float64, in floating-point operations, ascending along M. Padding is not
            counted, as nowhere in the ledger.
        """
        stages = [self.encoder.stage_flops(m, sizes) for m in range(self.num_heads)]
        return np.stack(stages, axis=1).cumsum(axis=1) + np.cumsum(self._head_flops())

    def static_flops(self, sizes: NDArray[np.int64]) -> Flops:
        """What a model of stages 1..m with head m alone would cost, [rows, M] float64."""
        stages = [self.encoder.stage_flops(m, sizes) for m in range(self.num_heads)]
        return np.stack(stages, axis=1).cumsum(axis=1) + self._head_flops()

    def _head_flops(self) -> Flops:
        heads: list[ExitHead] = list(self.heads)  # type: ignore[arg-type]
        return np.array([head.flops for head in heads])

    def spec(self) -> dict[str, Any]:
        """What ``build`` needs to build an equal one, weights aside; JSON values."""
        return {"encoder": self.encoder.spec(), "classes": self.classes, "hidden": self.hidden}


def build(spec: dict[str, Any]) -> MultiExit:
    """A model of this form, its weights not set.

    Raises:
        ModelError: for a form that this version does not know.
    """
    try:
        encoder = dict(spec["encoder"])
        match encoder.pop("kind"):
            case "bert":
                made: Encoder = Bert(BertConfig(**encoder))
            case "resnet":
                made = ResNet(int(encoder["blocks"]), tuple(encoder["exits"]))
            case other:
                raise ModelError(f"encoder.kind must be bert or resnet, got {other!r}.")
        return MultiExit(made, int(spec["classes"]), int(spec["hidden"]))
    except (KeyError, TypeError) as error:
        raise ModelError(f"the classifier's form is damaged: {error!r}.") from error
