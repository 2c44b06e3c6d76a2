"""What a threshold learns from the rows it let itself see."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.exits.beta_mixture import GRID, START
from fathom.exits.bias import Method, View, replay
from fathom.exits.histogram import Kind

STEP = float(GRID[1] - GRID[0])


def rows_of(n: int, share: float, agree, disagree, seed: int):  # type: ignore[no-untyped-def]
    random = np.random.default_rng(seed)
    agrees = random.random(n) < share
    return np.where(agrees, random.beta(*agree, n), random.beta(*disagree, n)), agrees


def overconfident(n: int, seed: int):  # type: ignore[no-untyped-def]
    """Disagreement in two sorts of rows: unsure ones, and some that are as sure as can be."""
    random = np.random.default_rng(seed)
    confidence, agrees = rows_of(n, 0.7, (5, 1), (1.5, 4), seed)
    sure = random.random(n) < 0.25
    return np.where(sure, random.beta(30, 1, n), confidence), agrees & ~sure


@given(
    view=st.sampled_from(list(View)), method=st.sampled_from(list(Method)), seed=st.integers(0, 9)
)
@settings(max_examples=12, deadline=None)
def test_each_view_labels_what_it_says(view, method, seed) -> None:
    c, y = rows_of(400, 0.7, (5, 1), (1.5, 3), seed)
    c[7] = np.nan
    groups = np.arange(400) // 20
    run = replay(c, y, groups, view=view, method=method, probe_rate=0.2, seed=seed)
    sure = np.nan_to_num(c, nan=-1) > run.thresholds
    probed = sure & ~run.exits
    known = ~np.isnan(c)
    assert not (run.exits & ~sure).any()
    match view:
        case View.ALL:
            expected = known
        case View.STAYED:
            expected = ~sure & known
        case View.STACKS:
            expected = np.zeros(400, dtype=bool)
            for group in np.split(np.arange(400), 20):
                stack: list[int] = []
                for row in group:
                    stack.append(row)
                    if not sure[row]:
                        expected[stack] = len(stack) > 1
                        stack = []
            expected &= known
        case _:
            expected = (~sure | probed) & known
            assert 0.05 < probed.sum() / sure.sum() < 0.4
    if view not in (View.WEIGHTED, View.LATENT):
        assert not probed.any()
    np.testing.assert_array_equal(run.labelled, expected)
    totals = run.histogram.totals
    latent = known.sum() - expected.sum() if view is View.LATENT else 0
    assert totals[Kind.UNLABELLED] == pytest.approx(latent)
    weights = np.where(probed, 5, 1) if view is View.WEIGHTED else np.ones(400)
    assert totals[Kind.AGREES] == pytest.approx(weights[expected & y].sum())
    assert totals[Kind.DISAGREES] == pytest.approx(weights[expected & ~y].sum())


def test_the_first_threshold_is_free_s() -> None:
    c, y = rows_of(40, 0.7, (5, 1), (1.5, 3), 0)
    run = replay(c, y, view=View.ALL, method=Method.EM, refit_every=32)
    assert (run.thresholds[:32] == START).all()


def test_without_probes_moments_run_away_and_probes_bring_them_back() -> None:
    c, y = rows_of(6000, 0.8, (6, 1), (2, 3), 1)
    oracle = replay(c, y, view=View.ALL, method=Method.MOMENTS).thresholds[-1]
    alone = replay(c, y, view=View.STAYED, method=Method.MOMENTS).thresholds[-1]
    assert abs(alone - oracle) > 3 * STEP
    probed = replay(c, y, view=View.WEIGHTED, method=Method.MOMENTS).thresholds[-1]
    assert abs(probed - oracle) <= STEP + 1e-9


def test_em_with_latent_rows_agrees_with_the_oracle() -> None:
    for seed in range(3):
        c, y = rows_of(6000, 0.75, (6, 1), (2, 3), seed)
        oracle = replay(c, y, view=View.ALL, method=Method.EM)
        latent = replay(c, y, view=View.LATENT, method=Method.EM, seed=seed)
        assert abs(latent.thresholds[-1] - oracle.thresholds[-1]) <= STEP + 1e-9
        assert latent.mixture.weight == pytest.approx(oracle.mixture.weight, abs=0.03)
        assert latent.labelled.mean() < 0.5


def test_wrong_rows_that_are_sure_are_seen_by_probes_alone() -> None:
    c, y = overconfident(8000, 0)
    truth = y[c > 0.9].mean()
    for view, sees in ((View.STAYED, False), (View.LATENT, True)):
        run = replay(c, y, view=view, method=Method.EM, probe_rate=0.05)
        sure = run.histogram.counts[:, run.histogram.edges[:-1] > 0.9].sum(axis=1)
        labelled = sure[Kind.AGREES] + sure[Kind.DISAGREES]
        if sees:
            assert sure[Kind.AGREES] / labelled == pytest.approx(truth, abs=0.12)
        else:
            assert labelled < 40  # of the time when λ was 0.9


@pytest.mark.parametrize("view", [View.ALL, View.STACKS, View.LATENT])
def test_it_follows_a_shift_within_500_rows(view) -> None:
    first = rows_of(3000, 0.9, (9, 1), (1.2, 4), 1)
    second = rows_of(3000, 0.5, (9, 1), (8, 4), 2)
    c, y = (np.concatenate(pair) for pair in zip(first, second, strict=True))
    run = replay(c, y, view=view, method=Method.EM, half_life=150, refit_every=16)
    settled = replay(*second, view=View.ALL, method=Method.EM).thresholds[-1]
    before = np.median(run.thresholds[2500:3000])
    assert settled - before > 3 * STEP  # there is something to follow
    assert abs(np.median(run.thresholds[3500:3700]) - settled) <= STEP + 1e-9


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="rows"):
        replay([0.5], [True, False], view=View.ALL, method=Method.EM)
    with pytest.raises(ValueError, match="probe_rate"):
        replay([0.5], [True], view=View.ALL, method=Method.EM, probe_rate=0)
