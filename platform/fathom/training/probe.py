"""``fathom train probe``: which exit layer, and which head? Chosen by measurement, not guessed.

For every candidate layer the hidden states of the frozen model are read off once. A head on them
is fitted in closed form (ridge regression to the final state), or is the model's own. Its drafts on
held-out answers, replayed at the stage costs that this machine measures, predict the speed-up of
each accept mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fathom.engine.costs import StageCosts
from fathom.engine.measure import measure_stage_costs
from fathom.exits.confidence import softmax_gap
from fathom.models.decoder import Decoder
from fathom.models.linear import Linear
from fathom.training.examples import IGNORED, Batch
from fathom.training.model import ShallowDeep, Shape
from fathom.training.validate import Drafts
from fathom.tuning.replay import Prediction, replay
from fathom.types import AcceptMode

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
WRONG_BUDGET = 0.02
"""Share of wrong tokens that a prediction for mode ``free`` may have."""

_ROWS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of answers, in order.

    Attributes:
        states: layer -> [n, d]. final: [n, d], normed. choice: [n] the full path's token.
        sequence: [n] which answer.
    """

    states: dict[int, Tensor]
    final: Tensor
    choice: Tensor
    sequence: Tensor


@torch.no_grad()
def collect(base: Any, batches: Sequence[Batch], layers: Sequence[int]) -> Rows:
    """Read off the states at the rows with a label.

    Args:
        base: a Hugging Face model, left as it is.
    """
    model = ShallowDeep(base, Shape(exit_layer=min(layers), tune="exit"))
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    final, choice, sequence = [], [], []
    number = 0
    for batch in tqdm(batches, desc="states", unit="batch"):
        rows = batch.labels != IGNORED
        states = model(batch.token_ids, rows, deep=True, keep=layers)
        for layer in layers:
            parts[layer].append(states.layers[layer])
        final.append(model.norm(states.deep))
        choice += [model.lm_head(part).argmax(-1) for part in final[-1].split(_ROWS_AT_ONCE)]
        owner = torch.arange(len(batch.examples))[:, None].expand_as(rows)[rows]
        sequence.append(owner + number)
        number += len(batch.examples)
    joined = {layer: torch.cat(found) for layer, found in parts.items()}
    return Rows(joined, torch.cat(final), torch.cat(choice), torch.cat(sequence))


class CandidateHead:
    """A head that can be timed as the engine times one, and asked for drafts.

    Args:
        linear: A of ``h + A h``, or None. scores: maps [rows, d] to logits, one matrix or two.
        token_ids: what the columns stand for; None: all tokens.
    """

    def __init__(
        self,
        name: str,
        norm: Tensor,
        eps: float,
        linear: Tensor | None,
        scores: Sequence[Tensor],
        token_ids: Tensor | None,
    ) -> None:
        self.name = name
        self.token_ids = token_ids
        self._norm, self._eps = norm, eps
        self._linear = None if linear is None else Linear(linear)
        self._scores = [Linear(matrix) for matrix in scores]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, d] -> [rows, n] in the model's dtype."""
        if self._linear is not None:
            hidden = self._linear(hidden).add_(hidden)
        out = F.rms_norm(hidden, hidden.shape[-1:], self._norm, self._eps)
        for matrix in self._scores:
            out = matrix(out)
        return out


def candidate_heads(
    base: Any, fit: Rows, layer: int, ranked: Tensor, subsets: Sequence[int], rank: int
) -> Iterator[CandidateHead]:
    """The model's own head on this layer; a fitted one with each subset, all tokens, low rank.

    Args:
        ranked: [vocabulary] int64, most frequent token first. rank: of the low-rank LM head, the
            best one in the least-squares sense (truncated SVD).
    """
    norm, weight = base.model.norm.weight.detach(), base.lm_head.weight.detach()
    eps = float(base.config.rms_norm_eps)
    yield CandidateHead("own, all tokens", norm, eps, None, [weight], None)
    linear = _ridge(fit.states[layer], fit.final / norm).to(weight.dtype)
    for size in subsets:
        ids = ranked[:size]
        yield CandidateHead(f"fitted, {size} tokens", norm, eps, linear, [weight[ids]], ids)
    yield CandidateHead("fitted, all tokens", norm, eps, linear, [weight], None)
    inner, outer = _low_rank(weight, rank)
    yield CandidateHead(f"fitted, all tokens, rank {rank}", norm, eps, linear, [inner, outer], None)


def _ridge(states: Tensor, target: Tensor, penalty: float = 1e-3) -> Tensor:
    """A of h + A h: both sides at root mean square 1; see ``training.model.fit_head``."""
    size = states.shape[1]
    x, z = F.rms_norm(states.float(), (size,)), F.rms_norm(target.float(), (size,))
    gram = x.T @ x
    gram += penalty * gram.diagonal().mean() * torch.eye(size)
    return torch.linalg.solve(gram, x.T @ z).T - torch.eye(size)


def _low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[rank, d] and [vocabulary, rank], whose product is nearest to ``weight``."""
    values = weight.float()
    _, vectors = torch.linalg.eigh(values.T @ values)  # right singular vectors, cheaply
    inner = vectors[:, -rank:].T.contiguous()
    return inner.to(weight.dtype), (values @ inner.T).to(weight.dtype)


@dataclass(frozen=True, slots=True)
class Drafted:
    """Drafts of a candidate. nats: [n] float32, -log p_deep(draft), for mode ``rollback``."""

    drafts: Drafts
    nats: Tensor


@torch.inference_mode()
def draft(head: CandidateHead, base: Any, rows: Rows, layer: int) -> Drafted:
    """What a candidate drafts at each row."""
    gaps, agrees, nats = [], [], []
    for start in range(0, len(rows.choice), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        gap, column = softmax_gap(head.logits(rows.states[layer][part]))
        token = column if head.token_ids is None else head.token_ids[column]
        deep = base.lm_head(rows.final[part]).float().log_softmax(-1)
        gaps.append(gap)
        agrees.append(token == rows.choice[part])
        nats.append(-deep.gather(-1, token[:, None])[:, 0])
    return Drafted(Drafts(torch.cat(gaps), torch.cat(agrees), rows.sequence), torch.cat(nats))


def predict(
    drafted: Drafted,
    costs: StageCosts,
    mode: AcceptMode,
    threshold: float,
    *,
    cap: int,
    nats: float,
) -> Prediction:
    """See ``fathom.tuning.replay.replay``. nats: tolerance of ``rollback``."""
    drafts = drafted.drafts
    agree = drafts.agree.tolist()
    fine = (drafted.nats <= nats).tolist() if mode is AcceptMode.ROLLBACK else agree
    ends = torch.unique_consecutive(drafts.sequence, return_counts=True)[1].cumsum(0).tolist()
    return replay(drafts.confidence.tolist(), agree, fine, ends, costs, mode, threshold, cap=cap)


def best_predictions(
    drafted: Drafted, costs: StageCosts, *, cap: int = 8, nats: float = 2.0
) -> dict[AcceptMode, Prediction | None]:
    """The fastest threshold of each mode; of ``free`` and ``rollback`` within WRONG_BUDGET."""
    found: dict[AcceptMode, Prediction | None] = {}
    for mode in (AcceptMode.EXACT, AcceptMode.ROLLBACK, AcceptMode.FREE):
        tried = [predict(drafted, costs, mode, t, cap=cap, nats=nats) for t in THRESHOLDS]
        within = [p for p in tried if mode is AcceptMode.EXACT or p.wrong <= WRONG_BUDGET]
        found[mode] = max(within, key=lambda p: p.speedup, default=None)
    return found


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of the report; costs in seconds of one row."""

    layer: int
    head: str
    agreement: float
    coverage: float
    shallow_s: float
    deep_s: float
    best: dict[AcceptMode, Prediction | None]


def probe(
    base: Any,
    decoder: Decoder,
    fit: Rows,
    heldout: Rows,
    *,
    layers: Sequence[int],
    ranked: Tensor,
    subsets: Sequence[int],
    rank: int,
    block_size: int = 16,
    max_rows: int = 64,
) -> Iterator[Candidate]:
    """Score every layer with every head.

    Args:
        decoder: the same model as the engine runs it; its stages are timed.
    """
    for layer in layers:
        for head in candidate_heads(base, fit, layer, ranked, subsets, rank):
            drafted = draft(head, base, heldout, layer)
            costs = measure_stage_costs(decoder, head, layer, block_size, max_rows)
            yield Candidate(
                layer=layer,
                head=head.name,
                agreement=drafted.drafts.agreement,
                coverage=drafted.drafts.coverage(0.95),
                shallow_s=costs.shallow(1),
                deep_s=costs.deep(1),
                best=best_predictions(drafted, costs),
            )
