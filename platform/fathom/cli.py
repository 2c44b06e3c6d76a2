"""The ``fathom`` command: parses options, runs one subcommand, turns errors into exit codes.

Nothing heavy is imported here or at the top of ``fathom.commands``: ``fathom --help`` must answer
at once, and a mistyped option must not cost the seconds that torch takes to load.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fathom import __version__
from fathom.commands import (
    bench,
    calibrate,
    chaos,
    dashboard,
    doctor,
    evaluate,
    exits,
    export,
    generate,
    promote,
    pull,
    serve,
    train,
    tune,
)
from fathom.commands.options import HelpFormatter, UsageError
from fathom.config import ConfigError
from fathom.types import InvalidRequest

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_EPILOG = """\
examples:
  fathom pull                                    get the default model
  fathom generate "Why is the sky blue?"         stream an answer, coloured by depth
  fathom serve --port 8000                       an OpenAI-compatible server on Ray Serve
  fathom bench engine --modes full,exact,free    measure, beside the ideal speed-up
  fathom bench cluster --json cluster.json       fused beside disaggregated
  fathom chaos --requests 200 --seed 1           kill its processes under load, lose nothing
  fathom train exits --help                      train exits that are worth taking
  fathom calibrate fit t.parquet --out p.yaml    operating points from a trace
  fathom tune study.yaml                         search settings, keep the front, serve it
  fathom dashboard --open                        watch a server, ask it, promote points
  fathom promote small --server URL              a study's fastest good point into production
  fathom exits show                              what a server's exit policies have seen
  fathom eval --tasks gsm8k --modes full,free    quality and speed beside the full model
  fathom export --for vllm --out draft           the shallow stage as a draft model for vLLM
  fathom doctor                                  what is here, what is missing

exit codes: 0 done, 1 failure, 2 bad usage, 130 interrupted. FATHOM_DEBUG=1 shows tracebacks.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="fathom",
        description="Serve language models at adaptive depth.",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fathom {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (
        serve, generate, pull, bench, chaos, train, calibrate, tune, promote, dashboard, exits,
        evaluate, export, doctor,
    ):  # fmt: skip
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. Errors are one line on stderr."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("fathom: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (``| head``) has gone: point stdout elsewhere, so that the interpreter's own
        # flush at exit does not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except (UsageError, ConfigError, InvalidRequest) as error:
        return _report(error, EXIT_USAGE)
    except Exception as error:
        return _report(error, EXIT_FAILURE)


def _report(error: Exception, code: int) -> int:
    """Say in one line what went wrong; returns ``code``."""
    if os.environ.get("FATHOM_DEBUG", "0") not in ("", "0"):
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (KeyError, AttributeError, TypeError, AssertionError)):
        # Such a message means little without its kind, and is a defect of ours.
        text = f"{type(error).__name__}: {text} (FATHOM_DEBUG=1 shows where)"
    print(f"fathom: error: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
