"""Options that several subcommands share, and how they become configuration."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from fathom.attention.names import ATTENTIONS
from fathom.config import DEFAULT_MODEL, DTYPES, EngineConfig, FlushWhen
from fathom.types import (
    AcceptMode,
    ComputePolicy,
    Confidence,
    InvalidRequest,
    PolicyName,
    SamplingParams,
)

MODE_HELP = "full and exact are lossless; rollback, free and copy (CALM's) are lossy"


class UsageError(ValueError):
    """Options or input that cannot be used; the message names the remedy."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of examples, and leaves room for long options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], *, about: str, examples: str
) -> argparse.ArgumentParser:
    """Add a subcommand's parser, with its description and examples."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog="examples:\n" + examples,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_engine_options(parser: argparse.ArgumentParser, *, threads: bool = True) -> None:
    """Options of ``EngineConfig``. Defaults are None, so that a configuration file can set them."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--model",
        help=f"hub name, directory in Hugging Face form, or GGUF file (default: {DEFAULT_MODEL})",
    )
    group.add_argument("--dtype", choices=DTYPES, help="weights and KV (default: bfloat16)")
    group.add_argument(
        "--quantization",
        metavar="BITS",
        help="of the layers' weights: none (default), int8 or int4; of each stage: SHALLOW:DEEP",
    )
    group.add_argument("--device", help="torch device (default: cpu)")
    group.add_argument(
        "--attention",
        choices=ATTENTIONS,
        help="what computes attention (default: auto, the fastest of kernel, flashinfer and sdpa "
        "that runs here)",
    )
    group.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="on a GPU, capture passes of up to 128 rows (default: they are)",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="on a GPU, let torch compile what layers do around attention (default: no)",
    )
    if threads:
        group.add_argument("--threads", type=int, help="torch threads; 0: torch's own choice")
    group.add_argument(
        "--adapter",
        metavar="NAME|DIR",
        help="what was trained for early exits: auto (the model's own default), none, the name "
        "of one that ships, or a folder",
    )
    group.add_argument(
        "--exit-layer", type=int, metavar="K", help="layers of the shallow stage; 0: the adapter's"
    )
    group.add_argument(
        "--exit-vocab",
        type=int,
        metavar="N",
        help="frequency-ranked tokens that the exit head scores; 0: the adapter's, -1: all",
    )
    group.add_argument(
        "--meta", metavar="FILE", help="trained classifier for --confidence meta (default: none)"
    )
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="most sequences at once")
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt + answer")
    group.add_argument("--kv-cache-bytes", type=int, metavar="N", help="of both stages' KV pools")
    group.add_argument(
        "--pause-drafting",
        action=argparse.BooleanOptionalAction,
        help="modes go to full depth while drafting does not pay (default: they do)",
    )
    group.add_argument(
        "--flush-rule",
        choices=[rule.value for rule in FlushWhen],
        help="when those that wait get the deep stage: when that makes more tokens a second than "
        "drafting on (rate, the default), when none can draft (full), or at once (eager)",
    )


def add_compute_options(parser: argparse.ArgumentParser, *, mode: bool = True) -> None:
    """Options of ``ComputePolicy``."""
    group = parser.add_argument_group("depth")
    if mode:
        group.add_argument(
            "--mode",
            choices=[mode.value for mode in AcceptMode],
            help=f"{MODE_HELP} (default: exact)",
        )
    group.add_argument(
        "--policy",
        choices=[policy.value for policy in PolicyName],
        help="what decides an exit (default: threshold; forced, budget or risk with their options)",
    )
    group.add_argument(
        "--exit-threshold",
        type=float,
        metavar="X",
        help="exit above this confidence, in [0, 1] (default: 0.5 where drafts are verified, "
        "0.9 in free)",
    )
    group.add_argument(
        "--confidence",
        choices=[confidence.value for confidence in Confidence],
        help="what the threshold is compared with (default: softmax_gap)",
    )
    group.add_argument(
        "--exit-temperature",
        type=float,
        metavar="T",
        help="divide the exit head's logits by this before the confidence is taken (default: 1)",
    )
    group.add_argument(
        "--budget",
        type=float,
        metavar="B",
        help="spend this share of full compute a token, in (0, 1] (policy budget)",
    )
    group.add_argument(
        "--risk",
        type=float,
        metavar="D",
        help="differ from the full model on at most this share of tokens, in (0, 1) (policy risk)",
    )
    group.add_argument(
        "--risk-confidence",
        type=float,
        metavar="C",
        help="probability with which the promise of --risk holds (default: 0.9)",
    )
    group.add_argument(
        "--probe-rate",
        type=float,
        metavar="R",
        help="share of exits that go to the deep stage all the same, to learn from (default: 0.02 "
        "under the policies adaptive and risk, else 0)",
    )
    group.add_argument(
        "--forced-exit-rate",
        type=float,
        metavar="R",
        help="exit at random at this rate (a benchmark's policy)",
    )
    group.add_argument(
        "--max-stack", type=int, metavar="N", help="most drafts that wait for the deep stage"
    )
    group.add_argument(
        "--rollback-nats", type=float, metavar="X", help="tolerance of mode rollback, in nats"
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``SamplingParams``."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--new-tokens", type=int, default=128, metavar="N", help="most tokens (default: 128)"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)"
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus mass")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all")
    group.add_argument("--seed", type=int, help="makes sampling reproducible")
    group.add_argument("--ignore-eos", action="store_true", help="keep going past end of text")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end there (may be repeated)"
    )


def compute_values(args: argparse.Namespace) -> dict[str, Any]:
    """The compute options that were given, as fields of ``ComputePolicy``."""
    values = _given(args, *ComputePolicy.__dataclass_fields__)
    for name, policy in (
        ("forced_exit_rate", PolicyName.FORCED),
        ("budget", PolicyName.BUDGET),
        ("risk", PolicyName.RISK),
    ):
        if name in values:
            values.setdefault("policy", policy)
    return values


def engine_values(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, as fields of ``EngineConfig``, ``compute`` left out."""
    values = _given(args, *EngineConfig.__dataclass_fields__)
    values.pop("compute", None)
    return values


def compute_policy(args: argparse.Namespace) -> ComputePolicy:
    """The checked compute policy that the options ask for.

    Raises:
        InvalidRequest: for a value out of range.
    """
    policy = ComputePolicy(**compute_values(args))
    policy.validate()
    return policy


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The checked sampling parameters that the options ask for.

    Raises:
        UsageError: for a value out of range.
    """
    params = SamplingParams(
        max_tokens=args.new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
        stop=tuple(args.stop),
    )
    try:
        params.validate()
    except InvalidRequest as error:
        # The command line's name of the field at fault.
        option = {"max_tokens": "new_tokens"}.get(error.param or "", error.param or "")
        text = str(error).replace(error.param or "", f"--{option.replace('_', '-')}", 1)
        raise UsageError(text) from error
    return params


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: v for name in names if (v := getattr(args, name, None)) is not None}
