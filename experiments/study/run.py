"""A small study from nothing to a server that runs at what it found: `make study`.

    python -m experiments.study.run --work study-work          # and --keep to keep the server

1. writes prompts, and records a trace of the model's answers at full depth (`fathom generate`);
2. searches for settings by replays of the trace, and runs finalists live (`fathom tune`);
3. starts a server (`fathom serve`);
4. promotes the fastest point that loses at most so much quality, on that server (`fathom promote`);
5. asks the server something without a word on compute, and checks that it ran at that point.

Every command is printed as a user would type it. What is done is kept: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openai import OpenAI

from experiments.commands import fathom, record_trace, say
from experiments.study.prompts import questions, write_prompts
from fathom.commands.options import add_engine_options, engine_values
from fathom.commands.servers import free_port, serving
from fathom.config import EngineConfig, ServeConfig

HERE = Path(__file__).parent
QUESTION = "Why do leaves fall in autumn?"


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace, search, serve, promote, ask."""
    args = _options(arguments)
    engine = engine_values(args)
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    _trace(work, args.prompts, args.new_tokens, engine)
    study = work / "study"
    _copy(args.study, work / "study.yaml")
    fathom("tune", work / "study.yaml", "--work-dir", study)
    store = f"sqlite:///{(study / 'mlflow.db').resolve()}"
    port = args.port or free_port()
    config = ServeConfig(
        engine=EngineConfig(**{**engine, "threads": 0}), port=port, mlflow=store, drain_s=1
    )
    say("serve", *_flags(engine, but="threads"), "--port", port, "--mlflow", store)
    with serving(config) as url:
        promoted = work / "promoted.json"
        loss = ("--max-quality-loss", args.max_quality_loss)
        fathom("promote", study, *loss, "--server", url, "--json", promoted)
        point = json.loads(promoted.read_text())["point"]
        compute = _ask(url, config.engine.model, args.new_tokens)
        _tell(point, compute, url, store, time.perf_counter() - begin)
        if compute["operating_point"] != point:
            print(f"the server did not run at {point}", file=sys.stderr)
            return 1
        if args.keep:
            print("Ctrl-C stops the server.", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--study", type=Path, default=HERE / "study.yaml", metavar="FILE", help="default: its own"
    )
    parser.add_argument(
        "--prompts", type=int, default=len(questions()), metavar="N",
        help=f"of the trace; default: {len(questions())}",
    )  # fmt: skip
    parser.add_argument(
        "--new-tokens", type=int, default=48, metavar="N", help="of an answer; default: 48"
    )
    parser.add_argument(
        "--max-quality-loss", type=float, default=0.05, metavar="SHARE",
        help="of the point that is promoted: tokens unlike the full model's; default: 0.05",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=0, metavar="N", help="default: a free one")
    parser.add_argument("--keep", action="store_true", help="keep the server until Ctrl-C")
    add_engine_options(parser)
    return parser.parse_args(arguments)


def _trace(work: Path, count: int, new_tokens: int, engine: Mapping[str, Any]) -> None:
    """Record the trace, unless it is there."""
    prompts, trace = work / "prompts.jsonl", work / "trace.parquet"
    if trace.exists():
        print(f"{trace}: is there already")
        return
    write_prompts(prompts, count)
    # One thread, as a replica of one core has: the trace keeps what passes cost.
    batch = {"max_num_seqs": 16, "threads": 1, **engine}
    record_trace(prompts, trace, "--new-tokens", new_tokens, *_flags(batch))


def _ask(url: str, model: str, new_tokens: int) -> dict[str, Any]:
    """What the ledger says of a completion whose request names no compute policy."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=new_tokens,
        temperature=0,
    )
    print(f"\n> {QUESTION}\n{answer.choices[0].message.content}\n", flush=True)
    assert answer.usage is not None
    return dict((answer.usage.model_extra or {})["compute"])


def _tell(point: str, compute: Mapping[str, Any], url: str, store: str, seconds: float) -> None:
    named = compute["operating_point"] or "no point"
    print(
        f"promoted {point}; the request named no compute policy and ran at {named}: mode "
        f"{compute['mode']}, {compute['exit_rate']:.0%} of the tokens decided at the exit, "
        f"{compute['layers_per_token']:.1f} layers a token. {seconds:.0f} s in all.\n\n"
        f"Runs, figures and the registry:  mlflow ui --backend-store-uri {store}\n"
        f"Dashboard, while it serves:      {url}/dashboard\n"
        f"Studies without a server:        fathom dashboard --mlflow {store}",
        flush=True,
    )


def _copy(study: Path, path: Path) -> None:
    """The study beside its trace, for its paths are relative to it."""
    if study.resolve() != path.resolve():
        shutil.copyfile(study, path)


def _flags(engine: Mapping[str, Any], but: str = "") -> list[object]:
    return [
        each
        for name, value in engine.items()
        if name != but
        for each in (f"--{name.replace('_', '-')}", value)
    ]


if __name__ == "__main__":
    # So that a server is ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
