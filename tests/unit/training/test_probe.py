"""Choosing exit layer and head: the replay by hand, and the heads against their definitions."""

from __future__ import annotations

import pytest
import torch

from fathom.engine.costs import CostCurve, StageCosts
from fathom.models.load import load_decoder
from fathom.training.exits import batches_of
from fathom.training.probe import (
    Drafted,
    _low_rank,
    best_predictions,
    collect,
    draft,
    predict,
    probe,
)
from fathom.training.validate import Drafts
from fathom.types import AcceptMode

COSTS = StageCosts(
    shallow=CostCurve(((1, 2.0), (10, 2.0))),
    shallow_full=CostCurve(((1, 1.0), (10, 1.0))),
    deep=CostCurve(((1, 9.0), (10, 18.0))),
)


def drafted(rows: list[tuple[float, bool, float]], sequence: list[int]) -> Drafted:
    gap, agree, nats = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Drafted(Drafts(gap, agree, torch.tensor(sequence)), nats)


def test_the_replay_is_what_decoding_would_cost() -> None:
    rows = [
        (0.9, True, 0.1),
        (0.8, False, 1.0),
        (0.7, True, 0.1),
        (0.1, True, 0.1),
        (0.9, True, 0.1),
    ]
    found = drafted(rows, [0, 0, 0, 0, 1])
    # free: rows 0-3 in one flush, row 4 (another answer) in its own; one wrong of five.
    free = predict(found, COSTS, AcceptMode.FREE, 0.5, cap=8, nats=0.5)
    assert free.speedup == pytest.approx(10 * 5 / (5 * 2 + (9 + 3) + 9))
    assert free.wrong == 1 / 5
    # exact: an answer's first row goes deep at once; the flush of rows 1-3 keeps the correction of
    # row 1; then 2, 3; then 4.
    exact = predict(found, COSTS, AcceptMode.EXACT, 0.5, cap=8, nats=0.5)
    assert exact.speedup == pytest.approx(
        10 * 5 / ((1 + 3 + 2 + 1) * 2 + 9 + (9 + 2) + (9 + 1) + 9)
    )
    assert exact.wrong == 0
    # rollback within 2 nats keeps the wrong draft.
    rollback = predict(found, COSTS, AcceptMode.ROLLBACK, 0.5, cap=8, nats=2.0)
    assert rollback.speedup == pytest.approx(10 * 5 / ((1 + 3 + 1) * 2 + 9 + (9 + 2) + 9))
    assert rollback.wrong == 1 / 5
    # A cap of 1 flushes after every draft, with the row behind it.
    capped = predict(found, COSTS, AcceptMode.FREE, 0.5, cap=1, nats=0.5)
    assert capped.speedup == pytest.approx(10 * 5 / (5 * 2 + 2 * (9 + 1) + 9))


def test_free_is_predicted_within_its_budget_of_wrong_tokens() -> None:
    good = drafted([(0.9, True, 0.0)] * 60 + [(0.2, False, 9.0)] * 40, list(range(100)))
    best = best_predictions(good, COSTS)
    assert best[AcceptMode.FREE].threshold >= 0.2
    hopeless = drafted([(1.0, False, 9.0)] * 10, list(range(10)))
    assert best_predictions(hopeless, COSTS)[AcceptMode.FREE] is None


def test_a_low_rank_head_of_full_rank_is_the_head() -> None:
    weight = torch.randn(50, 8)
    inner, outer = _low_rank(weight, 8)
    torch.testing.assert_close(outer @ inner, weight, rtol=1e-4, atol=1e-4)


def test_every_layer_and_head_is_scored(base, examples, model_dir) -> None:
    fit, held = (collect(base, batches_of(part), [1, 3]) for part in (examples[:64], examples[64:]))
    decoder = load_decoder(model_dir, dtype=torch.float32)
    ranked = torch.arange(40)
    found = list(
        probe(base, decoder, fit, held, layers=[1, 3], ranked=ranked, subsets=[20], rank=8)
    )
    assert [(c.layer, c.head) for c in found] == [
        (layer, head)
        for layer in (1, 3)
        for head in (
            "own, all tokens",
            "fitted, 20 tokens",
            "fitted, all tokens",
            "fitted, all tokens, rank 8",
        )
    ]
    for candidate in found:
        assert 0 <= candidate.agreement <= 1
        assert candidate.shallow_s > 0
        assert candidate.best[AcceptMode.EXACT].wrong == 0


def test_a_fitted_head_recovers_a_linear_exit(base, examples) -> None:
    """Where the final state is a linear map of the exit's, the fit finds it."""
    from fathom.training.probe import Rows, candidate_heads

    rows = collect(base, batches_of(examples), [1])
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    final = base.model.norm(rows.states[1] @ turn)
    choice = base.lm_head(final).argmax(-1)
    made = Rows(rows.states, final.detach(), choice, rows.sequence)
    heads = list(candidate_heads(base, made, 1, torch.arange(40), [], 8))
    assert draft(heads[1], base, made, 1).drafts.agreement > 0.97
    assert draft(heads[0], base, made, 1).drafts.agreement < 0.5
