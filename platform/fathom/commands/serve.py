"""``fathom serve``: an OpenAI-compatible server on Ray Serve."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fathom.commands.options import (
    add_command,
    add_compute_options,
    add_engine_options,
    compute_values,
    engine_values,
)
from fathom.commands.points import add_point_options
from fathom.config import (
    SCHEME,
    ConfigError,
    LoadConfig,
    ServeConfig,
    ShadowConfig,
    Topology,
    VllmConfig,
    from_mapping,
)
from fathom.settings import read_yaml

BUILDER = "deployments.app:build"

_EXAMPLES = """\
  fathom serve                                  the default model at http://127.0.0.1:8000
  fathom serve --demo                           the same; asks it something and shows the depths
  fathom serve --config fused.yaml --port 9000  a file's settings; options override them
  FATHOM_API_KEY=secret fathom serve --host 0.0.0.0 --replicas 4 --threads 8
  fathom serve --config deployments/disaggregated.yaml    a Ray Serve config file's application
  fathom serve --shallow-replicas 2 --deep-replicas 1     the two stages in processes of their own
  fathom serve --topology vllm --vllm-python DIR/bin/python       vLLM's engine, to compare with
  fathom serve --operating-points points.yaml --operating-point balanced    measured settings
  fathom serve --operating-points models:/NAME@production --mlflow URI      what was promoted

With RAY_ADDRESS set, the server runs on that cluster; otherwise on this machine.
--mode, --exit-threshold and the other depth options are what requests get that do not say.
Without FATHOM_API_KEY (several keys: separated by commas) only loopback addresses are served.
With FATHOM_OPERATOR_KEY (one or several as well) only those keys may promote and roll back.
"""


def add_parser(commands: Any) -> None:
    """Declare the options."""
    parser = add_command(
        commands, "serve", run, about="serve a model through Ray Serve", examples=_EXAMPLES
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="settings in YAML (see ServeConfig), or a Serve config file",
    )
    parser.add_argument("--demo", action="store_true", help="stream one answer once it is up")
    server = parser.add_argument_group("server")
    server.add_argument("--host", help="address to bind (default: 127.0.0.1)")
    server.add_argument("--port", type=int, help="port to bind (default: 8000)")
    server.add_argument("--model-name", metavar="NAME", help="what clients ask for")
    server.add_argument(
        "--classifier",
        metavar="DIR",
        help="a classifier of `fathom train multi-exit`, served beside the model at /v1/classify",
    )
    server.add_argument(
        "--load-aware",
        dest="shift_under_load",  # a request's compute has a field of the other name
        action="store_true",
        help="take cheaper settings under pressure, where requests allow it",
    )
    server.add_argument(
        "--mlflow",
        metavar="URI",
        help="MLflow tracking server: what the shadow finds goes there, points come from there",
    )
    server.add_argument(
        "--shadow",
        type=float,
        metavar="RATE",
        help="compare a share of the completions with the full model, and say when they drift",
    )
    server.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        nargs="?",
        const="env",
        help="send traces of requests there by OTLP over HTTP, e.g. "
        "http://localhost:4318/v1/traces; without a URL, where OTEL_EXPORTER_OTLP_ENDPOINT says",
    )
    server.add_argument(
        "--replicas", type=int, metavar="N", help="fused or vLLM replicas (default: 1)"
    )
    server.add_argument(
        "--threads", type=int, metavar="N", help="CPU cores and threads of a replica (default: 1)"
    )
    server.add_argument(
        "--topology",
        choices=[topology.value for topology in Topology],
        help="both stages in every replica (fused, the default), replicas for each "
        "(disaggregated), or replicas of vLLM, full depth alone (vllm)",
    )
    server.add_argument(
        "--vllm-python",
        metavar="FILE",
        help="interpreter that has vLLM, Fathom and Ray, for --topology vllm (default: this one)",
    )
    server.add_argument("--shallow-replicas", type=int, metavar="N", help="disaggregated ones")
    server.add_argument("--deep-replicas", type=int, metavar="N", help="disaggregated ones")
    add_compute_options(parser)
    add_point_options(parser)
    add_engine_options(parser, threads=False)


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """The file's settings with the options' on top, checked.

    Raises:
        ConfigError: for a file or a value that cannot be used.
    """
    config = read_config(args.config) if args.config else ServeConfig()
    engine = engine_values(args)
    engine.pop("threads", None)  # a replica's threads follow from its cores
    compute = dataclasses.replace(config.engine.compute, **compute_values(args))
    config = dataclasses.replace(
        config,
        engine=dataclasses.replace(config.engine, compute=compute, **engine),
        shallow=dataclasses.replace(
            config.shallow, **_given(num_replicas=args.shallow_replicas, cpus=args.threads)
        ),
        deep=dataclasses.replace(
            config.deep, **_given(num_replicas=args.deep_replicas, cpus=args.threads)
        ),
        **_given(
            host=args.host,
            port=args.port,
            model_name=args.model_name,
            classifier=args.classifier and str(Path(args.classifier).absolute()),
            operating_points=_points(args.operating_points),
            load_aware=_load_aware(args, config),
            mlflow=args.mlflow,
            shadow=_shadow(args, config),
            otlp_traces_endpoint=args.otlp_traces_endpoint,
            topology=_topology(args, config),
            vllm=_vllm(args, config),
            num_replicas=args.replicas,
            cpus_per_replica=args.threads,
        ),
    )
    config.validate()
    return config


def read_config(path: str) -> ServeConfig:
    """Settings from a file: ours, or the application's in a Ray Serve config file.

    Where Serve's ``http_options`` say a host or a port, they win, as with ``serve run``.

    Raises:
        ConfigError: for a file that cannot be used.
    """
    values = read_yaml(path)
    if "applications" not in values:
        return from_mapping(ServeConfig, values)
    applications = [each for each in values["applications"] if each.get("import_path") == BUILDER]
    if len(applications) != 1:
        raise ConfigError(
            f"{path}: applications must have one with import_path: {BUILDER}, got "
            f"{len(applications)}."
        )
    arguments: Mapping[str, Any] = applications[0].get("args") or {}
    http = values.get("http_options") or {}
    address = {name: http[name] for name in ("host", "port") if name in http}
    return from_mapping(ServeConfig, {**arguments, **address})


def _topology(args: argparse.Namespace, config: ServeConfig) -> Topology | None:
    """The topology that the options ask for; None if they do not.

    Raises:
        ConfigError: if they contradict each other, or the file.
    """
    pools = [name for name in ("shallow", "deep") if getattr(args, f"{name}_replicas") is not None]
    topology = Topology(args.topology) if args.topology else None
    if pools and topology is None:
        topology = Topology.DISAGGREGATED
    chosen = topology or config.topology
    if pools and chosen is not Topology.DISAGGREGATED:
        raise ConfigError(
            f"--{pools[0]}-replicas goes with --topology disaggregated, got {chosen}."
        )
    if args.replicas is not None and chosen is Topology.DISAGGREGATED:
        raise ConfigError(
            "--replicas is the number of fused or vLLM replicas; with topology disaggregated say "
            f"--shallow-replicas and --deep-replicas, got --replicas {args.replicas}."
        )
    return topology


def _vllm(args: argparse.Namespace, config: ServeConfig) -> VllmConfig | None:
    if args.vllm_python is None:
        return None
    # Not resolved: in a virtual environment it is a link, and its place says which one.
    return dataclasses.replace(config.vllm, python=str(Path(args.vllm_python).absolute()))


def _points(where: str | None) -> str | None:
    """A file's path as every folder has it; what is in a registry as it is."""
    if where is None or where.startswith(SCHEME):
        return where
    return str(Path(where).absolute())


def _load_aware(args: argparse.Namespace, config: ServeConfig) -> LoadConfig | None:
    return dataclasses.replace(config.load_aware, enabled=True) if args.shift_under_load else None


def _shadow(args: argparse.Namespace, config: ServeConfig) -> ShadowConfig | None:
    return None if args.shadow is None else dataclasses.replace(config.shadow, rate=args.shadow)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


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
        show_calls(client, model, console, full_depth=config.topology is Topology.VLLM)
    except BaseException:
        server.stop()
        raise
    server.wait()
    return 0
