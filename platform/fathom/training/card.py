"""The card of an adapter: what it is, what it was trained on, how, and what came of it."""

from __future__ import annotations

import json
from typing import Any

from fathom.models.adapters import Adapter
from fathom.training.validate import Drafts

THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


def card(adapter: Adapter, drafts: Drafts, curve: list[tuple[int, float]], command: str) -> str:
    """Markdown.

    Args:
        drafts: on held-out examples. curve: (step, held-out agreement) of each check.
        command: that trained it.
    """
    notes: dict[str, Any] = json.loads(adapter.metadata["training"])
    settings, shape = notes["settings"], notes["shape"]
    kinds = {
        "exit": "the model's own layers are as they were: the full path cannot differ",
        "lora": f"low-rank changes (rank {shape['lora_rank']}) of all layers, the full path's too",
        "full": "all weights were trained: the full path is another model",
    }
    lines = [
        f"# {adapter.metadata['name']}: exits for {adapter.metadata['model']}",
        "",
        "| | |",
        "|---|---|",
        f"| shared layers | {adapter.exit_layer} |",
        f"| exit layers | {adapter.exit_layers} |",
        f"| trained | `--tune {shape['tune']}`: {kinds[shape['tune']]} |",
        f"| exit head | {len(adapter.token_ids)} tokens, "
        f"{'a linear map and ' if shape['head_adapter'] else ''}a norm |",
        f"| examples | {notes['examples']}, {notes['targets']} target tokens |",
        f"| steps | {settings['steps']} of at most {settings['batch_tokens']} tokens, the best one "
        f"was {notes['best_step']} |",
        "",
        "```",
        command,
        "```",
        "",
        "## Held out",
        "",
        "Agreement of the exit's best token with the full path's, and the share of tokens whose "
        "confidence is above a threshold / how many of those agree:",
        "",
        "| domain | tokens | agreement | coverage at 95% precision | "
        + " | ".join(f"λ {t:g}" for t in THRESHOLDS)
        + " |",
        "|" + "---|" * (4 + len(THRESHOLDS)),
    ]
    for name, part in [
        ("all", drafts),
        *((d, drafts.of(d)) for d in sorted(set(drafts.domain))),
    ]:
        cells = [
            f"{share:.1%} / {right:.1%}" if share else "0% / –"
            for share, right in map(part.above, THRESHOLDS)
        ]
        lines.append(
            f"| {name} | {len(part.agree)} | {part.agreement:.1%} | "
            f"{part.coverage(0.95):.1%} | " + " | ".join(cells) + " |"
        )
    if curve:
        lines += ["", "Agreement on all of them by step:", ""]
        lines += ["| step | " + " | ".join(str(step) for step, _ in curve) + " |"]
        lines += ["|" + "---|" * (1 + len(curve))]
        lines += ["| agreement | " + " | ".join(f"{value:.1%}" for _, value in curve) + " |"]
    return "\n".join(lines) + "\n"
