"""How cost grows: tokens/s and memory over sequences at once, and over the length of the context.

    python -m experiments.speed.growth --quantization int4 --out growth-int4.json --plot growth.png

Mode `full`, answers of a fixed length. Sequences: 1 to 64 at a context of 128 tokens. Contexts: one
sequence behind 128 to as many tokens as the model takes. Every point is run so many times, in turns
with the others; medians. Decoding is what comes while all of them decode: after the last one's
first token, before the first one's last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from tqdm import tqdm

from fathom.commands.options import add_engine_options, engine_values
from fathom.config import EngineConfig
from fathom.engine.engine import Engine
from fathom.tuning.plotting import BLUE, ORANGE, panels, save, style
from fathom.types import AcceptMode, ComputePolicy, Request, SamplingParams

SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
SHORT = CONTEXTS[0]


@dataclass(frozen=True)
class Point:
    """One load.

    Attributes:
        sequences: at once. context: tokens of each one's prompt.
        decode_tokens_per_s: of all together. ttft_ms: of the slowest request.
        kv_mib: of the keys and values of all of them. rss_mib: of this process, its pools included.
    """

    sequences: int
    context: int
    decode_tokens_per_s: float
    ttft_ms: float
    kv_mib: float
    rss_mib: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, draw."""
    args = _options(arguments)
    values = {"threads": 1, "kv_cache_bytes": 512 << 20, **engine_values(args)}
    config = EngineConfig(max_num_seqs=max(SEQUENCES), prefix_caching=False, **values)
    engine = Engine.from_config(config)
    room = engine.info.max_model_len - args.new_tokens
    loads = [(count, SHORT) for count in SEQUENCES]
    loads += [(1, min(context, room)) for context in CONTEXTS[1:]]
    found: dict[tuple[int, int], list[Point]] = {load: [] for load in loads}
    _measure(engine, 1, SHORT, args.new_tokens)  # the first pass of a process is slow
    for load in tqdm(loads * args.runs, "loads"):
        found[load].append(_measure(engine, load[0], load[1], args.new_tokens))
    points = [_median(each) for each in found.values()]
    meta = {name: getattr(engine.info, name) for name in ("model", "dtype", "quantization")}
    meta |= {"threads": config.threads, "new_tokens": args.new_tokens, "runs": args.runs}
    args.out.write_text(json.dumps({"meta": meta, "rows": [*map(asdict, points)]}, indent=1) + "\n")
    for point in points:
        print(
            f"{point.sequences:3} x {point.context:5}: {point.decode_tokens_per_s:7.1f} tokens/s, "
            f"TTFT {point.ttft_ms:7.0f} ms, KV {point.kv_mib:6.1f} MiB, "
            f"RSS {point.rss_mib:.0f} MiB"
        )
    if args.plot:
        _plot(points, args.plot, f"{meta['dtype']}, {meta['quantization']}, one thread")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--new-tokens", type=int, default=48, metavar="N", help="default: 48")
    add_engine_options(parser)
    return parser.parse_args(arguments)


def _measure(engine: Engine, sequences: int, context: int, new_tokens: int) -> Point:
    ids = range(engine.info.vocab_size)
    # Different tokens everywhere: nothing is shared.
    prompts = [
        tuple(ids[(97 * index + 31 * place + 5) % len(ids)] for place in range(context))
        for index in range(sequences)
    ]
    begin = time.perf_counter()
    came = _token_times(engine, prompts, new_tokens)
    # All of them decode from the last one's first token to the first one's last.
    start, stop = max(each[0] for each in came), min(each[-1] for each in came)
    tokens = sum(start < moment <= stop for each in came for moment in each)
    kv = engine.ledger.costs.kv_bytes * engine.info.num_layers
    return Point(
        sequences=sequences,
        context=context,
        decode_tokens_per_s=tokens / (stop - start),
        ttft_ms=1e3 * (start - begin),
        kv_mib=kv * sequences * (context + new_tokens) / (1 << 20),
        rss_mib=psutil.Process().memory_info().rss / (1 << 20),
    )


def _token_times(
    engine: Engine, prompts: Sequence[tuple[int, ...]], new_tokens: int
) -> list[list[float]]:
    """When each token of each answer came, in seconds of ``time.perf_counter``."""
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        compute = ComputePolicy(mode=AcceptMode.FULL)
        engine.add_request(
            Request(
                request_id=str(index), prompt_token_ids=prompt, sampling=sampling, compute=compute
            )
        )
    came: list[list[float]] = [[] for _ in prompts]
    while engine.has_work():
        for output in engine.step():
            came[int(output.request_id)] += [time.perf_counter()] * len(output.tokens)
    return came


def _median(points: Sequence[Point]) -> Point:
    columns = {
        name: statistics.median(getattr(point, name) for point in points)
        for name in Point.__dataclass_fields__
    }
    return Point(**{**columns, "sequences": points[0].sequences, "context": points[0].context})


def _plot(points: Sequence[Point], path: Path, title: str) -> None:
    many = [point for point in points if point.context == SHORT]
    long = [point for point in points if point.sequences == 1]
    with style():
        figure, axes = panels(2)
        for axis, own, name in (
            (axes[0], many, "sequences"),
            (axes[1], long, "context"),
        ):
            xs = [getattr(point, name) for point in own]
            axis.plot(xs, [point.decode_tokens_per_s for point in own], "o-", color=BLUE)
            axis.set(xscale="log", ylabel="decoded tokens/s", ylim=(0, None), xlabel=name)
            axis.set_xticks(xs, labels=[str(x) for x in xs])
            axis.minorticks_off()
            memory = axis.twinx()
            memory.grid(visible=False)
            memory.plot(xs, [point.kv_mib for point in own], "s--", color=ORANGE)
            memory.set(ylabel="keys and values, MiB", ylim=(0, None))
        axes[0].set(title=f"{SHORT} tokens of context each; {title}")
        axes[1].set(title="one sequence")
        save(figure, path)


if __name__ == "__main__":
    raise SystemExit(main())
