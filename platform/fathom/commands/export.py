"""``fathom export``: the shallow path as a draft model that other engines load."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from fathom.commands.options import HelpFormatter, UsageError
from fathom.config import DEFAULT_MODEL, DTYPES, EngineConfig

_ABOUT = """\
Writes the shallow stage with its exit head as a checkpoint in Hugging Face form, which vLLM's own
speculative decoding loads as a draft model: lossless self-speculation without Fathom. The exit
head's linear map is folded into an LM head, which changes no greedy draft.

A model that came from a GGUF file is written too, into OUT/target: others would not get the same
weights from that file.

--vocab N gives the draft a vocabulary of N tokens: special ones, those of the chat template, those
that the exit head ranks, then the lowest ids. vLLM matches them by their spelling. Such a draft is
much cheaper where the LM head weighs as much as the layers, as in small models, and agrees somewhat
less often: it cannot read the other tokens of a text.

"""

_EXAMPLES = """\
  fathom export --for vllm --out draft
  fathom export --for vllm --out draft --vocab 6144            cheaper drafts
  fathom export --for vllm --out draft --model Qwen/Qwen3-0.6B --adapter my-adapter
  fathom export --for vllm --out draft --adapter none --exit-layer 10
"""


def add_parser(commands: Any) -> None:
    """Declare the options."""
    parser = commands.add_parser(
        "export",
        help="the shallow stage as a draft model for vLLM",
        description=_ABOUT,
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--for", dest="engine", choices=("vllm",), required=True, help="the engine that loads it")
    add("--out", type=Path, required=True, metavar="DIR", help="a folder that is empty or new")
    add(
        "--model", default=DEFAULT_MODEL,
        help=f"hub name, directory in Hugging Face form, or GGUF file (default: {DEFAULT_MODEL})",
    )  # fmt: skip
    add("--adapter", default="auto", metavar="NAME|DIR", help="as of `fathom serve`")
    add(
        "--exit-layer", type=int, default=0, metavar="K",
        help="layers that the draft shares with the model; 0: the adapter's, or a third",
    )  # fmt: skip
    add(
        "--vocab", type=int, default=0, metavar="N",
        help="tokens of the draft's vocabulary; 0: the model's (default)",
    )  # fmt: skip
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the files (default: bfloat16)")


def run(args: argparse.Namespace) -> int:
    """Write the draft, and print the command that serves with it."""
    if args.vocab < 0:
        raise UsageError(f"--vocab must be at least 0, got {args.vocab}.")
    settings = EngineConfig(model=args.model, adapter=args.adapter, exit_layer=args.exit_layer)
    settings.validate()

    from fathom.engine.build import adapter_of
    from fathom.engine.plan import exit_layer_of
    from fathom.models.config import ModelConfig
    from fathom.models.export_files import export
    from fathom.models.load import resolve_model, weights_digest

    directory = resolve_model(args.model)
    adapter = adapter_of(settings, weights_digest(directory))
    exit_layer = exit_layer_of(settings, ModelConfig.from_directory(directory), adapter)
    notes = export(
        directory, adapter, args.out, exit_layer=exit_layer, vocab=args.vocab, dtype=args.dtype
    )
    speculative = json.dumps(notes["speculative_config"])
    command = ["vllm", "serve", notes["target"], "--speculative-config", speculative]
    print(shlex.join(command))
    return 0
