"""Evaluations as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from fathom.training.evaluate import WRONG_BUDGETS, Drafts, Evaluation, Prediction

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)
BUDGETS = ("exact", *(f"free {budget:.0%}" for budget in WRONG_BUDGETS))


def threshold_rows(drafts: Drafts) -> list[tuple[float, float, float]]:
    """(threshold, coverage, precision) at each of THRESHOLDS; precision NaN without coverage."""
    found = []
    for threshold in THRESHOLDS:
        confident = drafts.gap > threshold
        share = confident.float().mean().item()
        found.append((threshold, share, drafts.agree[confident].float().mean().item()))
    return found


def show(prediction: Prediction | None) -> str:
    """A prediction as a table cell."""
    if prediction is None:
        return "none"
    p = prediction
    return f"{p.speedup:.2f} (λ {p.threshold:g}, {p.per_flush:.2f})"


def report(evaluations: Sequence[Evaluation]) -> str:
    """Markdown tables: agreement and predictions by head, then everything by domain."""
    domains = list(evaluations[0].drafts)
    counts = ", ".join(f"{d} {len(evaluations[0].drafts[d].agree)}" for d in domains)
    lines = [
        f"Agreement with the full model's argmax on held-out rows ({counts}), and over all chats "
        "the predicted speed-up over the full model (at its best threshold, tokens a flush):",
        "",
        "| k | head | tokens | " + " | ".join((*domains, *BUDGETS)) + " |",
        "|" + "---|" * (3 + len(domains) + len(BUDGETS)),
    ]
    for e in evaluations:
        cells = [f"{e.drafts[d].agree.float().mean().item():.1%}" for d in domains]
        cells += [show(e.best["chats"][budget]) for budget in BUDGETS]
        lines.append(f"| {e.k} | {e.variant} | {e.subset} | " + " | ".join(cells) + " |")
    heading = [f"λ {t:g}" for t in THRESHOLDS] + ["exact", "free 2%"]
    lines += [
        "",
        "Coverage / precision at confidence thresholds, and predictions by domain:",
        "",
        "| k | head | tokens | domain | " + " | ".join(heading) + " |",
        "|" + "---|" * (4 + len(heading)),
    ]
    for e in evaluations:
        for domain, drafts in e.drafts.items():
            cells = [f"{share:.1%} / {hits:.1%}" for _, share, hits in threshold_rows(drafts)]
            cells += [show(e.best[domain][budget]) for budget in ("exact", "free 2%")]
            line = f"| {e.k} | {e.variant} | {e.subset} | {domain} | " + " | ".join(cells) + " |"
            lines.append(line)
    return "\n".join(lines) + "\n"
