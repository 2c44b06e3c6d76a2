"""The losses of free.md against their formulas, written out."""

from __future__ import annotations

import math

import torch

from fathom.training import losses


def test_cross_entropy_over_a_subset_quiets_what_it_cannot_know() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [1.0, 1.0, 1.0]])
    labels = torch.tensor([0, -1])
    known = math.log(math.exp(2) + 1 + math.exp(-1)) - 2
    torch.testing.assert_close(
        losses.subset_cross_entropy(logits, labels, 0.0), torch.tensor(known / 2)
    )
    # A uniform row is where the outside loss is least: log n.
    expected = (known + 0.1 * math.log(3)) / 2
    torch.testing.assert_close(
        losses.subset_cross_entropy(logits, labels, 0.1), torch.tensor(expected)
    )


def test_soft_cross_entropy_is_the_plain_one_where_the_full_path_is_sure() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [1.0, 3.0, 1.0]])
    sure = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])  # the second row's lies outside
    torch.testing.assert_close(
        losses.soft_cross_entropy(logits, sure, 0.1),
        losses.subset_cross_entropy(logits, torch.tensor([0, -1]), 0.1),
    )


def test_soft_cross_entropy_is_least_at_the_full_paths_own_logits() -> None:
    logits = torch.randn(5, 7)
    target = logits.softmax(-1)
    least = losses.soft_cross_entropy(logits, target, 0.1)
    torch.testing.assert_close(least, -(target * target.log()).sum(-1).mean())
    assert losses.soft_cross_entropy(logits + torch.randn(5, 7), target, 0.1) > least


def test_the_two_exits_are_weighted_by_their_depth() -> None:
    loss = losses.weighted(torch.tensor(6.0), torch.tensor(2.0), 10, 30)
    assert float(loss) == (10 * 6 + 30 * 2) / 40


def test_unif_pairs_are_those_of_the_paper() -> None:
    assert losses.unif_pairs(6, 24) == [(1, 4), (2, 8), (3, 12), (4, 16), (5, 20), (6, 24)]


def states(values: dict[int, float]) -> dict[int, torch.Tensor]:
    return {layer: torch.full((2, 3), value) for layer, value in values.items()}


def test_unif_is_the_mean_over_pairs() -> None:
    values = states({1: 0.0, 2: 1.0, 3: 9.0, 4: 3.0, 6: 5.0})
    # L_S 2 of 6: teachers 3 and 6.
    assert float(losses.kd_unif(values, 2, 6)) == ((9 - 0) ** 2 + (5 - 1) ** 2) / 2


def test_dyna_walks_down_and_never_back() -> None:
    # Teacher 6 is nearest to student 2; teacher 5 would like 3, but only 1 is left; then none.
    values = states({1: 0.0, 2: 4.0, 3: 9.0, 4: 4.0, 5: 9.0, 6: 4.0})
    assert float(losses.kd_dyna(values, [1, 2, 3])) == ((4 - 4) ** 2 + (9 - 0) ** 2) / 2


def test_distillation_leaves_the_teacher_alone() -> None:
    student = torch.randn(2, 3, requires_grad=True)
    teacher = torch.randn(2, 3, requires_grad=True)
    losses.kd_last(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_hold_is_zero_where_nothing_has_drifted() -> None:
    logits = torch.randn(4, 7)
    assert abs(float(losses.hold(logits, logits))) < 1e-6
    p, q = logits.softmax(-1), torch.randn(4, 7)
    expected = (p * (p.log() - q.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(losses.hold(q, logits), expected)
