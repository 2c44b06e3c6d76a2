"""Tables for the README and the figures, from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.tuning.plotting import BLUE, GREEN, GREY, ORANGE, PINK, name_points, panels, save, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
_METRICS = {"bleu": "BLEU", "rougeL": "ROUGE-L", "exact_match": "exact match"}
_LOOKS = {
    "full": ("black", "*"), "exact": ("black", "s"), "static": (GREY, "X"), "CALM": (ORANGE, "v"),
    "FREE fixed": (BLUE, "o"), "FREE adaptive": (BLUE, "D"), "risk": (GREEN, "^"),
    "budget": (PINK, "P"),
}  # fmt: skip
_COLUMNS = (
    "agreement with full", "foretold", "exits", "cost", "layers a token", "deep passes a token",
    "tokens/s", "of full's", "quartiles",
)  # fmt: skip


def write_tables(file: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Put the tables between the marks in the README."""
    text = file.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    tables = "\n".join(_table(result) for result in results)
    file.write_text(f"{before}{BEGIN}\n{tables}{END}{after}", encoding="utf-8")


def _table(result: Mapping[str, Any]) -> str:
    meta = result["meta"]
    first = result["outcomes"][0]
    lines = [
        f"### {meta['title']}",
        "",
        f"{meta['requests']} requests, {first['tokens']:,} tokens of the full model, at most "
        f"{meta['new_tokens']} an answer; exit after {meta['exit_depth']} of {meta['num_layers']} "
        f"layers; {meta['at_once']} at a time; {meta['rounds']} rounds; {meta['dtype']}, "
        f"{meta['threads']} thread(s).",
        "",
        f"| method | {_METRICS[meta['metric']]} (95%) | " + " | ".join(_COLUMNS) + " |",
        "|---|" + "---:|" * (len(_COLUMNS) + 1),
    ]
    for own in result["outcomes"]:
        promised = own["promised"]
        cells = (
            own["label"],
            _interval(own),
            f"{own['agreement']:.1%}",
            "" if promised is None else f"{promised:.1%}",
            f"{own['exit_rate']:.1%}",
            f"{own['cost']:.3f}",
            f"{own['layers_per_token']:.1f}",
            f"{own['deep_passes']:.2f}",
            f"{own['tokens_per_s']:.1f}",
            f"{own['ratio']:.2f}",
            f"{own['ratio_low']:.2f}–{own['ratio_high']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\n{name}: {why}" for name, why in result["missing"].items()]
    figure = f"![quality, agreement and speed on {meta['task']}]({meta['task']}.png)"
    return "\n".join([*lines, "", figure, "", ""])


def _interval(own: Mapping[str, Any]) -> str:
    form = "{:.1f}" if own["high"] > 1 else "{:.3f}"
    value, low, high = (form.format(own[name]) for name in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


def write_figure(result: Mapping[str, Any], path: Path) -> Path:
    """Agreement against cost, and quality against speed, a point a method; returns the path."""
    with style():
        return save(_figure(result), path)


def _figure(result: Mapping[str, Any]) -> Figure:
    meta, outcomes = result["meta"], result["outcomes"]
    figure, (left, right) = panels(2, width=5.6)
    handles: dict[str, Any] = {}
    for family, (color, marker) in _LOOKS.items():
        members = [own for own in outcomes if own["family"] == family]
        if not members:
            continue
        form = {"color": color, "marker": marker, "s": 70, "zorder": 3}
        handles[family] = left.scatter(
            [own["cost"] for own in members], [100 * own["agreement"] for own in members], **form
        )
        speeds, values = ([own[name] for own in members] for name in ("ratio", "value"))
        errors = [
            [own["value"] - own["low"] for own in members],
            [own["high"] - own["value"] for own in members],
        ]
        right.errorbar(speeds, values, yerr=errors, fmt="none", ecolor=color, alpha=0.35)
        right.plot(speeds, values, color=color, linewidth=0.8, alpha=0.6)
        right.scatter(speeds, values, **form)
    left.set(xlabel="cost of a token (share of full)", ylabel="tokens as the full model's (%)")
    right.set(xlabel="tokens/s (times the full model's)", ylabel=_METRICS[meta["metric"]])
    left.set_title(meta["task"])
    named = [own for own in outcomes if own["family"] in ("CALM", "FREE fixed")]
    left.set(xlim=left.get_xlim(), ylim=left.get_ylim())
    name_points(
        left,
        [own["cost"] for own in named],
        [100 * own["agreement"] for own in named],
        [own["name"].partition("-")[2].replace("paper", "0.9") for own in named],
    )
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=11
    )
    return figure
