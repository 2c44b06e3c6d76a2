"""What every encoder cut into stages offers; it runs rows and decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Flops = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class State:
    """The rows under way.

    Attributes:
        hidden: rows first: [rows, tokens, d] of a text encoder, [rows, channels, height, width]
            of an image encoder. Float.
        lengths: [rows] int64, real tokens of each row, which stand first; None for images.
    """

    hidden: Tensor
    lengths: Tensor | None = None


class Encoder(nn.Module):
    """An encoder in M stages; exit head m reads what ``feature`` makes of stage m's output.

    ``sizes`` below is what a row's cost depends on: its tokens for text; images ignore it.
    """

    num_stages: int

    def begin(self, inputs: Any, sizes: Tensor) -> State:
        """Turn a batch of inputs into rows.

        Args:
            inputs: [rows, tokens] int64 token ids, padded on the right with anything; or
                [rows, 3, height, width] float pixels, normalized.
            sizes: [rows] int64.
        """
        raise NotImplementedError

    def stage(self, index: int, state: State) -> State:
        """Run stage ``index`` (from 0) over all rows of ``state``."""
        raise NotImplementedError

    def narrow(self, state: State, rows: Tensor) -> State:
        """Keep these rows alone.

        Args:
            rows: [kept] int64 places in ``state``, ascending.
        """
        raise NotImplementedError

    def feature(self, index: int, state: State) -> Tensor:
        """What head ``index`` reads of that stage's output: [rows, ...] float."""
        raise NotImplementedError

    def make_head(self, index: int, classes: int, hidden: int) -> ExitHead:
        """A new head for stage ``index``.

        Args:
            classes: K. hidden: width of its hidden layer; 0 for a linear head.
        """
        raise NotImplementedError

    def stage_flops(self, index: int, sizes: NDArray[np.int64]) -> Flops:
        """Operations of stage ``index`` for rows of these sizes, [rows]; see ``fathom.ledger``."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """What ``build_encoder`` needs to build an equal one, weights aside; JSON values."""
        raise NotImplementedError


class ExitHead(nn.Module):
    """Maps a feature to logits [rows, K] float32.

    Attributes:
        flops: operations of one row.
    """

    flops: float


class LinearHead(ExitHead):
    """A norm and a linear map, or with ``hidden`` a norm and two with a GELU between them.

    Reads [rows, width] float.
    """

    def __init__(self, width: int, classes: int, hidden: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.LayerNorm(width)]
        if hidden:
            parts += [nn.Linear(width, hidden), nn.GELU()]
        parts.append(nn.Linear(hidden or width, classes))
        self.net = nn.Sequential(*parts)
        self.flops = 2.0 * (width * hidden + hidden * classes if hidden else width * classes)

    def forward(self, feature: Tensor) -> Tensor:
        """Logits of [rows, width]."""
        logits: Tensor = self.net(feature)
        return logits.float()
