"""``fathom serve``: an OpenAI-compatible server on Ray Serve."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import Any

from fathom.commands.options import (
    add_command,
    add_compute_options,
    add_engine_options,
    compute_values,
    engine_values,
)
from fathom.config import ServeConfig, load_yaml

_EXAMPLES = """\
  fathom serve                                  the default model at http://127.0.0.1:8000
  fathom serve --demo                           the same; asks it something and shows the depths
  fathom serve --config fused.yaml --port 9000  a file's settings; options override them
  FATHOM_API_KEY=secret fathom serve --host 0.0.0.0 --replicas 4 --threads 8

--mode, --exit-threshold and the other depth options are what requests get that do not say.
Without FATHOM_API_KEY (several keys: separated by commas) only loopback addresses are served.
"""


def add_parser(commands: Any) -> None:
    """Declare the options."""
    parser = add_command(
        commands, "serve", run, about="serve a model through Ray Serve", examples=_EXAMPLES
    )
    parser.add_argument("--config", metavar="FILE", help="settings in YAML (see ServeConfig)")
    parser.add_argument("--demo", action="store_true", help="stream one answer once it is up")
    server = parser.add_argument_group("server")
    server.add_argument("--host", help="address to bind (default: 127.0.0.1)")
    server.add_argument("--port", type=int, help="port to bind (default: 8000)")
    server.add_argument("--model-name", metavar="NAME", help="what clients ask for")
    server.add_argument("--replicas", type=int, metavar="N", help="engine replicas (default: 1)")
    server.add_argument(
        "--threads", type=int, metavar="N", help="CPU cores and threads of a replica (default: 1)"
    )
    add_compute_options(parser)
    add_engine_options(parser, threads=False)


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """The file's settings with the options' on top, checked.

    Raises:
        ConfigError: for a file or a value that cannot be used.
    """
    config = load_yaml(ServeConfig, args.config) if args.config else ServeConfig()
    engine = engine_values(args)
    engine.pop("threads", None)  # a replica's threads follow from its cores
    compute = dataclasses.replace(config.engine.compute, **compute_values(args))
    options = {
        "host": args.host,
        "port": args.port,
        "model_name": args.model_name,
        "num_replicas": args.replicas,
        "cpus_per_replica": args.threads,
    }
    config = dataclasses.replace(
        config,
        engine=dataclasses.replace(config.engine, compute=compute, **engine),
        **{name: value for name, value in options.items() if value is not None},
    )
    config.validate()
    return config


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    config = serve_config(args)
    try:
        from deployments import app
    except ModuleNotFoundError as error:
        if error.name != "deployments":
            raise
        raise RuntimeError(
            "the package `deployments` is not installed; run `python -m pip install -e .` in the "
            "project's folder."
        ) from error

    from rich.console import Console

    from fathom.commands.demo import Client, show_answer, show_calls

    model = config.model_name or config.engine.model
    print(f"starting Ray Serve with {model} (Ctrl-C stops)", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    server = app.run(config, blocking=False)
    try:
        print(f"ready after {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        client, console = Client(server.url), Console()
        if args.demo:
            show_answer(client, model, console)
        show_calls(client, model, console)
    except BaseException:
        server.stop()
        raise
    server.wait()
    return 0
