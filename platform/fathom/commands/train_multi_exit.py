"""``fathom train multi-exit``: a classifier that answers at any depth."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from fathom.commands.options import HelpFormatter, UsageError

_ABOUT = """\
Put an exit head after every layer of a text encoder, or after some blocks of a CIFAR-10 ResNet, and
train them together. What comes out is a folder that `fathom serve --classifier DIR` serves under
/v1/classify, for any budget a request names: thresholds are worked out from the held-out rows,
which the folder keeps.

Data are JSON lines {"text", "label"}, or Parquet with columns jpeg and label. Held-out rows must be
like those that will be served; some thousands of them keep a budget within a few percent. A run
that was interrupted goes on when the command is given again.

"""

_EXAMPLES = """\
  fathom train multi-exit --data train.jsonl.gz --heldout test.jsonl.gz --epochs 8 \\
      --batch-rows 128 --out news --work-dir run
  fathom train multi-exit --data train.jsonl --tune --epochs 1 --out mine --work-dir run2
  fathom train multi-exit --data cifar10_train.parquet --heldout cifar10_test.parquet --tune \\
      --encoder resnet32-d509ac18.th --exits 1,4,7,10,13,15 --batch-rows 128 \\
      --learning-rate 2e-3 --encoder-rate 3e-4 --out images --work-dir run3
"""


def add_parser(targets: Any) -> None:
    """Declare the options."""
    parser = targets.add_parser(
        "multi-exit",
        help="train a classifier with an exit head after each layer",
        description=_ABOUT,
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="labelled rows")
    add("--heldout", type=Path, metavar="FILE", help="default: a tenth of the data")
    add("--out", type=Path, required=True, metavar="DIR", help="the classifier")
    add("--work-dir", type=Path, required=True, metavar="DIR", help="checkpoint, features, MLflow")
    add("--name", help="the classifier's name (default: that of --out)")
    add("--mlflow", default="", metavar="URI", help="tracking server, or `none`")
    add("--threads", type=int, default=0, metavar="N", help="torch threads; 0: torch's own choice")
    shape = parser.add_argument_group("shape").add_argument
    shape(
        "--encoder",
        default="sentence-transformers/all-MiniLM-L6-v2",
        metavar="NAME|DIR|FILE",
        help="a BERT by its hub name or folder, or a .th file of a CIFAR-10 ResNet "
        "(default: sentence-transformers/all-MiniLM-L6-v2)",
    )
    shape("--tune", action="store_true", help="train the encoder too (default: heads alone)")
    shape("--hidden", type=int, metavar="N", help="width of text heads; 0: linear (default: 256)")
    shape("--exits", default="", metavar="LIST", help="blocks of a ResNet that heads follow")
    shape("--max-tokens", type=int, metavar="N", help="of a text (default: 64)")
    recipe = parser.add_argument_group("recipe").add_argument
    recipe("--epochs", type=int, metavar="N", help="default: 3")
    recipe("--batch-rows", type=int, metavar="N", help="default: 32")
    recipe("--learning-rate", type=float, metavar="X", help="of the heads (default: 1e-3)")
    recipe("--encoder-rate", type=float, metavar="X", help="of the encoder (default: 5e-5)")
    recipe("--weight-decay", type=float, metavar="X", help="default: 0.01")
    recipe("--seed", type=int, help="default: 0")


def run(args: argparse.Namespace) -> int:
    """Train, write the classifier, show its heads."""
    exits = _exits(args.exits)

    import torch
    from rich.console import Console
    from rich.table import Table

    from fathom.training.labelled import read_labelled
    from fathom.training.multi_exit import MultiExitTraining, split_heldout, train_multi_exit

    given = {f.name: getattr(args, f.name, None) for f in fields(MultiExitTraining)}
    given |= {"name": args.name or args.out.name, "exits": exits}
    plan = MultiExitTraining(**{name: v for name, v in given.items() if v is not None})
    plan.validate()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = read_labelled(args.data)
    if args.heldout:
        heldout = read_labelled(args.heldout)
    else:
        data, heldout = split_heldout(data)
    with contextlib.ExitStack() as stack:
        log = None
        if args.mlflow != "none":
            from fathom.training.tracking import Tracker

            params = {name: getattr(plan, name) for name in given}
            tracker = Tracker(args.work_dir, name=plan.name, params=params, uri=args.mlflow)
            log = stack.enter_context(tracker).log
        files = train_multi_exit(plan, data, heldout, args.work_dir, log=log)
        files.write(args.out)
    model, answers = files.model, files.calibration
    costs = model.cumulative_flops(answers.sizes).mean(0)
    table = Table("head", "share of full compute", "held-out accuracy")
    for number, (cost, right) in enumerate(
        zip(costs / costs[-1], answers.correct.mean(0), strict=True), 1
    ):
        table.add_row(str(number), f"{cost:.3f}", f"{right:.2%}")
    Console(stderr=True).print(table)
    print(args.out)
    return 0


def _exits(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise UsageError(f"--exits must be numbers of blocks like 1,4,7, got {text!r}.") from error
