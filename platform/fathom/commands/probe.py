"""``fathom train probe``: score candidate exit layers and heads before training any."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from fathom.commands.options import HelpFormatter, UsageError
from fathom.config import DEFAULT_MODEL, DTYPES

_ABOUT = """\
For each candidate exit layer and head: agreement with the full model on held-out answers, coverage
at 95% precision, measured stage costs, and the predicted speed-up of each mode at batch 1. Layers
are frozen here: training raises all figures.

"""

_EXAMPLES = """\
  fathom train probe --data answers.jsonl --layers 4,6,8,10,12
  fathom train probe --data answers.jsonl --layers 8 --subsets 1024,2048,4096 --json probe.json
"""


def add_parser(targets: Any) -> None:
    """Declare the options."""
    parser = targets.add_parser(
        "probe",
        help="score candidate exit layers and heads",
        description=_ABOUT,
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "--data", type=Path, nargs="+", required=True, metavar="FILE",
        help="answers, as `fathom generate --json` writes them, or other examples",
    )  # fmt: skip
    add("--layers", default="", metavar="LIST", help="default: six, up to two thirds")
    add("--subsets", default="2048,8192", metavar="LIST", help="sizes of a head's vocabulary")
    add("--rank", type=int, default=256, metavar="R", help="of the low-rank head (default: 256)")
    add("--examples", type=int, default=200, metavar="N", help="most examples (default: 200)")
    add("--max-length", type=int, default=512, metavar="N", help="tokens of an example")
    add("--model", default=DEFAULT_MODEL, help=f"default: {DEFAULT_MODEL}")
    add("--dtype", choices=DTYPES, default="bfloat16", help="in which stages are timed")
    add("--threads", type=int, default=1, metavar="N", help="torch threads (default: 1)")
    add("--json", type=Path, metavar="OUT", help="write the rows here")


def _integers(text: str, option: str, low: int, high: int) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < low or max(values) > high:
        raise UsageError(f"{option} must be a list of integers from {low} to {high}, got {text!r}.")
    return list(dict.fromkeys(values))


def run(args: argparse.Namespace) -> int:
    """Collect states, score, print the table."""
    missing = [path for path in args.data if not path.is_file()]
    if missing:
        raise UsageError(f"{missing[0]}: no such file; --data takes JSON lines.")
    for name in ("examples", "max_length", "rank", "threads"):
        if (value := getattr(args, name)) < 1:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} must be at least 1, got {value}.")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UsageError(f"{args.json}: there is no such folder; make it first.")

    import torch
    from rich.console import Console

    from fathom.models.load import load_decoder
    from fathom.training.examples import read_examples
    from fathom.training.exits import batches_of, load_base, rank_tokens
    from fathom.training.probe import collect, probe

    torch.set_num_threads(args.threads)
    base, tokenizer, directory = load_base(args.model, trained=False, device="cpu")
    count = base.config.num_hidden_layers
    vocab = base.config.vocab_size
    layers = sorted({max(1, round(count * i / 9)) for i in range(1, 7)})
    if args.layers:
        layers = _integers(args.layers, "--layers", 1, count - 1)
    subsets = _integers(args.subsets, "--subsets", 2, vocab)
    examples = read_examples(args.data, tokenizer, max_length=args.max_length)
    ranked = rank_tokens(examples, vocab)
    step = max(1, len(examples) // args.examples)
    chosen = examples[::step][: args.examples]
    # A quarter is held out: the ridge regression needs the most.
    held, fit = chosen[::4], [e for i, e in enumerate(chosen) if i % 4]
    if not fit:
        raise UsageError(f"{args.data[0]}: at least 2 examples are needed, got {len(chosen)}.")
    rows = [collect(base, batches_of(part), layers) for part in (fit, held)]
    decoder = load_decoder(directory, dtype=getattr(torch, args.dtype))
    console = Console()
    console.width = max(console.width, 140)
    with Console(stderr=True).status("timing the stages", refresh_per_second=2):
        candidates = probe(
            base, decoder, rows[0], rows[1],
            layers=layers, ranked=ranked, subsets=subsets, rank=args.rank,
        )  # fmt: skip
        found = list(candidates)
    console.print(_table(found))
    if args.json is not None:
        text = json.dumps({"rows": [_row(candidate) for candidate in found]}, indent=1)
        temporary = args.json.with_name(args.json.name + ".tmp")
        temporary.write_text(text + "\n")
        os.replace(temporary, args.json)
    return 0


def _row(candidate: Any) -> dict[str, Any]:
    best = {
        mode.value: None
        if p is None
        else {"threshold": p.threshold, "speedup": p.speedup, "wrong": p.wrong}
        for mode, p in candidate.best.items()
    }
    return {
        "exit_layer": candidate.layer,
        "head": candidate.head,
        "agreement": candidate.agreement,
        "coverage_at_precision_95": candidate.coverage,
        "shallow_ms": candidate.shallow_s * 1e3,
        "deep_ms": candidate.deep_s * 1e3,
        "predicted": best,
    }


def _table(candidates: list[Any]) -> Any:
    from rich.table import Table

    from fathom.types import AcceptMode

    table = Table(title="predicted speed-up over full at batch 1 (threshold)", title_justify="left")
    for heading in ("k", "head"):
        table.add_column(heading)
    modes = (AcceptMode.EXACT, AcceptMode.ROLLBACK, AcceptMode.FREE)
    for heading in ("agreement", "coverage at 95%", "shallow ms", "deep ms", *modes):
        table.add_column(str(heading), justify="right")
    for c in candidates:
        cells = [
            "–" if (p := c.best[mode]) is None else f"{p.speedup:.2f} ({p.threshold:g})"
            for mode in modes
        ]
        table.add_row(
            str(c.layer), c.head, f"{c.agreement:.1%}", f"{c.coverage:.1%}",
            f"{c.shallow_s * 1e3:.1f}", f"{c.deep_s * 1e3:.1f}", *cells,
        )  # fmt: skip
    return table
