"""``fathom chaos``: kill the processes of a server under load, and account for what was lost."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.commands.options import UsageError, add_command, add_engine_options, engine_values
from fathom.commands.reports import check_at_least_one, check_output, machine, mode_list, write_json
from fathom.commands.servers import free_port
from fathom.config import (
    DeepConfig,
    EngineConfig,
    KVStoreConfig,
    PoolConfig,
    ServeConfig,
    Topology,
    load_yaml,
)

if TYPE_CHECKING:
    from fathom.drills.chaos import Chaos, ChaosReport

_EXAMPLES = """\
  fathom chaos --requests 200 --kill-every 4 --seed 1 --json chaos.json
  fathom chaos --config disaggregated.yaml --kinds shallow,deep --seed 7
  RAY_ADDRESS=127.0.0.1:6379 fathom chaos --url http://127.0.0.1:8000 --config disaggregated.yaml

Without --url a server is started for the drill, small enough for two cores: two ingress, two
shallow and two deep replicas, two shards of the KV store, in float32. With --url a running one is
drilled; --config is then what it was started with, and it must be on this machine.

exit code 1: something was lost, changed or left behind.
"""

_ABOUT = """\
Streams greedy requests of every mode while processes die by SIGKILL, one every few seconds, and
compares each answer with the one that the same request had undisturbed. The client reconnects
with the request's id and Last-Event-ID when its connection breaks, and does nothing else.

One process dies at a time: a kind of which only one would be left is spared until it has
recovered, and of ingress and journal, which both know the streams, one is spared until the other
is back and knows them again. Kinds, order and times follow from --seed.

failed: requests without an answer. gaps, duplicates: places where a stream left something out, or
repeated it, by its event ids or by its content. mismatches: answers that differ in any way.
leaked_blocks: requests, KV pools in use, leases and objects that are held when all is over.

"""

MODES = "full,exact,rollback,free"


def default_config() -> ServeConfig:
    """A disaggregated server that fits two cores."""
    return ServeConfig(
        engine=EngineConfig(
            dtype="float32", kv_cache_bytes=128 << 20, max_num_seqs=8, max_model_len=1024
        ),
        topology=Topology.DISAGGREGATED,
        num_ingress_replicas=2,
        shallow=PoolConfig(num_replicas=2, cpus=0.5),
        deep=DeepConfig(num_replicas=2, cpus=0.5),
        kv_store=KVStoreConfig(shards=2, budget_bytes=256 << 20),
        drain_s=5,
    )


def add_parser(commands: Any) -> None:
    """Declare the options."""
    parser = add_command(
        commands,
        "chaos",
        run,
        about="kill a server's processes under load",
        examples=_EXAMPLES,
    )
    parser.description = _ABOUT
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument(
        "--kill-every", type=float, default=4.0, metavar="S", help="mean seconds (default: 4)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the plan (default: 0)")
    parser.add_argument(
        "--kinds", metavar="LIST", help="what to kill (default: everything that the server has)"
    )
    parser.add_argument("--modes", default=MODES, metavar="LIST", help=f"default: {MODES}")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--new-tokens", type=int, default=48, metavar="N", help="default: 48")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report here")
    parser.add_argument("--config", metavar="FILE", help="settings in YAML (see ServeConfig)")
    parser.add_argument("--port", type=int, help="of the server that is started (default: any)")
    parser.add_argument("--url", help="a running server on this machine")
    parser.add_argument("--app", default="fathom", help="its name in Serve (default: fathom)")
    add_engine_options(parser, threads=False)


def run(args: argparse.Namespace) -> int:
    """Check the options, hold the drill, show and write what it found."""
    check_at_least_one(args, "requests", "concurrency", "new_tokens")
    if not args.kill_every > 0:
        raise UsageError(f"--kill-every must be above 0, got {args.kill_every:g}.")
    check_output(args.json)
    if args.url and not args.config:
        raise UsageError("--url needs --config: the settings that the server was started with.")
    modes = mode_list(args.modes)
    config = _config(args)
    if not config.keep_streams_s > 0:
        raise UsageError("keep_streams_s must be above 0: clients could not come back otherwise.")

    from fathom.drills.plan import kinds_of

    kinds = args.kinds.split(",") if args.kinds else kinds_of(config)
    unknown = [kind for kind in kinds if kind not in kinds_of(config)]
    if unknown:
        known = ", ".join(kinds_of(config))
        raise UsageError(f"--kinds must be a list of {known}, got {unknown[0]!r}.")

    from fathom.drills.chaos import Chaos, ChaosOptions
    from fathom.drills.client import StreamClient
    from fathom.drills.workload import distinct_requests, pick

    options = ChaosOptions(
        requests=args.requests,
        concurrency=args.concurrency,
        kill_every_s=args.kill_every,
        kinds=kinds,
        seed=args.seed,
    )
    model = config.model_name or config.engine.model
    bodies = pick(distinct_requests(model, modes, args.new_tokens), args.requests)
    with ExitStack() as ending:
        url, key = _server(args, config, ending)

        from deployments.drill import Application

        chaos = Chaos(
            client=StreamClient(url, key=key),
            cluster=Application(args.app, config, url, key),
            bodies=bodies,
            options=options,
        )
        interrupted = _hold(chaos)
        report = chaos.report
        if args.json is not None:
            meta = {
                **machine(),
                "model": model,
                "config": dataclasses.asdict(config),
                "distinct_requests": len(bodies),
                "new_tokens": args.new_tokens,
                "modes": [mode.value for mode in modes],
                **dataclasses.asdict(options),
                "interrupted": interrupted,
            }
            write_json(args.json, {"meta": meta, **report.as_dict()})
        _show(report)
    if interrupted:
        raise KeyboardInterrupt
    return 0 if report.ok else 1


def _config(args: argparse.Namespace) -> ServeConfig:
    config = load_yaml(ServeConfig, args.config) if args.config else default_config()
    port = args.port or (config.port if args.config else free_port())
    # Answers are compared with those of a calm server: they must not depend on the load.
    values = {"pause_drafting": False, **engine_values(args)}
    engine = dataclasses.replace(config.engine, **values)
    config = dataclasses.replace(config, engine=engine, port=port)
    config.validate()
    return config


def _server(args: argparse.Namespace, config: ServeConfig, ending: ExitStack) -> tuple[str, str]:
    """URL and key of the server to drill, connected to its Ray; what is started ends with it."""
    from deployments import app
    from deployments.drill import connect, hush

    key = os.environ.get("FATHOM_API_KEY", "").split(",")[0].strip()
    if args.url:
        ending.callback(connect())
        return args.url.rstrip("/"), key
    hush()

    print("starting the server to drill (Ctrl-C stops)", file=sys.stderr, flush=True)
    server = app.run(config, blocking=False)
    ending.callback(server.stop)
    return server.url, key


def _hold(chaos: Chaos) -> bool:
    """Run the drill behind a progress bar; returns whether it was interrupted."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from fathom.drills.killer import Kill
    from fathom.drills.transcript import Transcript, Verdict

    report, options = chaos.report, chaos.options
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TextColumn("{task.fields[news]}"), console=Console(stderr=True)) as bar:
        undisturbed = bar.add_task("undisturbed", total=len(chaos.bodies), news="")
        drill = bar.add_task("under fire", total=options.requests, news="")

        def on_reference(found: Transcript) -> None:
            bar.advance(undisturbed)

        def on_request(verdict: Verdict) -> None:
            bar.advance(drill)
            show()

        def on_kill(kill: Kill) -> None:
            what = "left out" if kill.at_s is None else f"killed {kill.name} ({kill.pid})"
            wait = f", after waiting {kill.waited_s:.1f} s" if kill.waited_s >= 1 else ""
            at = "" if kill.at_s is None else f"{kill.at_s:7.1f} s  "
            bar.console.print(f"{at}{kill.blow.kind}: {what}{wait}", style="dim", highlight=False)
            show()

        def show() -> None:
            news = f"{report.killed} kills, {report.count('failed')} failed"
            bar.update(drill, news=news)

        chaos.on_reference, chaos.on_request, chaos.on_kill = on_reference, on_request, on_kill
        try:
            chaos.run()
        except KeyboardInterrupt:
            return True
    return False


def _show(report: ChaosReport) -> None:
    found = report.as_dict()
    names = "requests kills failed gaps duplicates mismatches leaked_blocks reconnects resumptions"
    print(" · ".join(f"{name} {found[name]}" for name in [*names.split(), "seconds"]))
    for index, each in found["errors"].items():
        print(f"request {index} failed: {each['error']}")
    if report.held is not None and report.held.total:
        print(f"held at the end: {report.held}")
    if not report.whole:
        print("a pool did not recover")
    if report.killer_error:
        print(f"the killing stopped early: {report.killer_error}")
