"""Decoding alone, for a profiler to look at: one batch at full depth, with the ledger's account.

    python -m experiments.speed.decode --batch 1 --new-tokens 400

`FATHOM_KERNELS=off` runs it on torch's kernels instead of ours. With --parts, Python's own profiler
says what a step's milliseconds go to; it makes steps a little slower.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Sequence

from fathom.bench.prompts import token_prompts
from fathom.commands.options import add_engine_options, engine_values
from fathom.config import EngineConfig
from fathom.engine.engine import Engine
from fathom.types import AcceptMode, ComputePolicy, Request, SamplingParams

FULL = ComputePolicy(mode=AcceptMode.FULL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Decode, and print milliseconds a step and the account."""
    args = _options(arguments)
    values = {"threads": 1, **engine_values(args)}
    engine = Engine.from_config(
        EngineConfig(max_num_seqs=args.batch, prefix_caching=False, **values)
    )
    _start(engine, args.batch, 8, "warm-up")
    while engine.has_work():
        engine.step()
    _start(engine, args.batch, args.new_tokens, "decode")
    while engine.stats()["generation_tokens"] < args.batch * 10:  # the prompts, and a little more
        engine.step()
    before, profile = engine.ledger.total.flops, cProfile.Profile()
    if args.parts:
        profile.enable()
    begin = time.perf_counter()
    steps = timed_steps(engine)
    seconds = time.perf_counter() - begin
    profile.disable()
    flops = engine.ledger.total.flops - before
    print(
        f"{engine.info.dtype}, {engine.info.quantization}, attention {engine.info.attention}: "
        f"{1e3 * seconds / steps:.2f} ms a step of {args.batch} rows, {flops / steps / 1e9:.3f} "
        f"GFLOP, {flops / seconds / 1e9:.1f} GFLOP/s, {engine.stats()['layers_per_token']:.1f} "
        "layers a token"
    )
    if args.parts:
        pstats.Stats(profile).sort_stats("tottime").print_stats(15)
    engine.close()
    return 0


def timed_steps(engine: Engine) -> int:
    """Decode to the end; a function of its own, so that a sampling profiler can tell it apart."""
    steps = 0
    while engine.has_work():
        engine.step()
        steps += 1
    return steps


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--new-tokens", type=int, default=400, metavar="N", help="default: 400")
    parser.add_argument("--parts", action="store_true", help="where a step's time goes")
    add_engine_options(parser)
    return parser.parse_args(arguments)


def _start(engine: Engine, batch: int, new_tokens: int, name: str) -> None:
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    for index, prompt in enumerate(token_prompts(engine.tokenizer, batch)):
        engine.add_request(
            Request(
                request_id=f"{name} {index}",
                prompt_token_ids=prompt,
                sampling=sampling,
                compute=FULL,
            )
        )


if __name__ == "__main__":
    raise SystemExit(main())
