"""What serving costs: tokens/s over HTTP through Ray Serve beside the engine's own, in one run.

    python -m experiments.speed.serving --out serving.json          # and --quantization int4

One server with one replica of one core, and the same engine in this process, by turns: the same
prompts (token ids of random tokens, no shared prefix), the same lengths, mode `full`, so many
streams at once. Client, gateway and Ray share the cores that the replica leaves. Medians; the ratio
is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fathom.bench.load_prompts import bodies_of, random_prompts
from fathom.bench.load_run import Target, run_load
from fathom.bench.measure import FathomContender
from fathom.commands.options import add_engine_options, engine_values
from fathom.commands.servers import free_port, serving
from fathom.config import EngineConfig, ServeConfig
from fathom.engine.engine import Engine
from fathom.types import AcceptMode, ComputePolicy

ENDPOINT = "/v1/completions"
FULL = {"compute": {"mode": "full"}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, load, compare, write."""
    args = _options(arguments)
    values = {"max_num_seqs": args.streams, **engine_values(args), "prefix_caching": False}
    engine = Engine.from_config(EngineConfig(**{**values, "threads": 1}))
    contender = FathomContender(engine, ComputePolicy(mode=AcceptMode.FULL))
    config = ServeConfig(
        engine=EngineConfig(**{**values, "threads": 0}), port=free_port(), drain_s=1
    )
    here: list[float] = []
    served: list[float] = []
    with serving(config) as url:
        for number in tqdm(range(args.runs + 1), "rounds"):  # the first warms up
            prompts = random_prompts(
                args.requests, args.prompt_tokens, seed=number, vocab_size=engine.info.vocab_size
            )
            ids = [tuple(map(int, prompt)) for prompt in prompts]
            here.append(contender.run(ids, args.streams, args.new_tokens).tokens_per_s)
            served.append(_served(url, config, prompts, args))
    here, served = here[1:], served[1:]
    ratio = statistics.median(s / h for s, h in zip(served, here, strict=True))
    report = {
        "cores": os.cpu_count(), "quantization": engine.info.quantization,
        "streams": args.streams, "requests": args.requests, "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens, "engine_tokens_per_s": here,
        "served_tokens_per_s": served, "served_over_engine": ratio,
    }  # fmt: skip
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{args.streams} streams: engine {statistics.median(here):.1f} tokens/s, over HTTP "
        f"{statistics.median(served):.1f} tokens/s, ratio {ratio:.2f}"
    )
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="JSON")
    add("--streams", type=int, default=16, metavar="N", help="at once; default: 16")
    add("--requests", type=int, default=48, metavar="N", help="of a run; default: 48")
    add("--prompt-tokens", type=int, default=64, metavar="N", help="default: 64")
    add("--new-tokens", type=int, default=64, metavar="N", help="default: 64")
    add("--runs", type=int, default=5, metavar="N", help="default: 5")
    add_engine_options(parser)
    return parser.parse_args(arguments)


def _served(
    url: str, config: ServeConfig, prompts: Sequence[Any], args: argparse.Namespace
) -> float:
    """Tokens a second of the server, from the first request to the last end."""
    bodies = bodies_of(
        prompts, endpoint=ENDPOINT, model=config.engine.model, output_len=args.new_tokens,
        ignore_eos=True, extra=FULL,
    )  # fmt: skip
    load = run_load(Target(url, ENDPOINT), bodies, None, max_concurrency=args.streams)
    tokens = sum(answer.tokens for answer in load.answers)
    if tokens != len(prompts) * args.new_tokens:
        wrong = next((a.error for a in load.answers if a.error), "answers were cut short")
        raise RuntimeError(f"the server gave {tokens} tokens: {wrong}")
    return tokens / load.seconds


if __name__ == "__main__":
    raise SystemExit(main())
