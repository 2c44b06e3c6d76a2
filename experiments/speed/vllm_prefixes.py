"""Time to the first token where the other kind of replica has computed the prefix.

    python -m experiments.speed.vllm_prefixes --vllm-python PYTHON

PYTHON is an interpreter with vLLM 0.32 and this package installed. Fathom fills the store with some
prompts and vLLM answers them; vLLM stores others and Fathom answers those. Beside each stands the
same program without a store, on the same prompts, one request at a time, one thread. ``--answers``
does one way alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import ray

from fathom.config import DEFAULT_MODEL, EngineConfig
from fathom.engine.build import build_engine
from fathom.engine.engine import Engine
from fathom.kvstore.ray_store import NAMESPACE, RayKVStore, start_store, stop_store
from fathom.models.resolve import resolve_model
from fathom.models.tokenizer import load_tokenizer
from fathom.types import AcceptMode, ComputePolicy, Request, SamplingParams

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "integration" / "vllm_kv.py"
STORE, SHARDS = "vllm-prefixes", 2


def main() -> None:
    """Run both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm-python", required=True, help="interpreter with vLLM and Fathom")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=5, help="of each kind")
    parser.add_argument("--tokens", type=int, default=1200, help="of a prompt")
    parser.add_argument("--answers", choices=("vllm", "fathom", "both"), default="both")
    parser.add_argument("--json", help="file for all figures")
    args = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, namespace=NAMESPACE, log_to_driver=False)
    store = RayKVStore(start_store(STORE, shards=SHARDS, budget_bytes=2 << 30))
    try:
        figures = measure(args, store)
    finally:
        stop_store(STORE, shards=SHARDS)
        ray.shutdown()
    if args.json:
        Path(args.json).write_text(json.dumps(figures))
    print("first tokens equal:", figures["equal"])


def show(figures: dict[str, list[float]], name: str, seconds: list[float]) -> None:
    """Note a row, and print it as soon as it is measured."""
    figures[name] = seconds
    shown = ", ".join(f"{1e3 * each:.0f}" for each in seconds)
    print(f"{name:44} {1e3 * statistics.median(seconds):6.0f} ms   ({shown})", flush=True)


def measure(args: argparse.Namespace, store: RayKVStore) -> dict[str, Any]:
    """Seconds to the first token of every prompt, by who answers and what is there."""
    figures: dict[str, Any] = {"seconds": {}, "equal": {}}
    if args.answers in ("vllm", "both"):
        vllm_answers(args, store, figures)
    if args.answers in ("fathom", "both"):
        fathom_answers(args, store, figures)
    return figures


def vllm_answers(args: argparse.Namespace, store: RayKVStore, figures: dict[str, Any]) -> None:
    """Fathom has computed the prompts; others, nobody."""
    ours, others = prompts(args, 0), prompts(args, 2)
    filler = engine_of(args, store)
    for ids in ours:
        ask(filler, ids, ComputePolicy(mode=AcceptMode.FULL))
    wait_for(store, ours)
    filler.close()
    shared = vllm(args, [*ours, *others], connector_of(args))
    n, seconds = len(ours), figures["seconds"]
    show(seconds, "vLLM, prefix computed by Fathom", shared["seconds"][:n])
    show(seconds, "vLLM, storing, nothing found", shared["seconds"][n:])
    figures["hits"] = shared["hits"]
    print("tokens that vLLM loaded:", shared["hits"], flush=True)
    alone = vllm(args, ours, None)
    show(seconds, "vLLM, no store", alone["seconds"])
    figures["equal"]["vLLM"] = [
        a == b for a, b in zip(alone["answers"], shared["answers"][:n], strict=True)
    ]


def fathom_answers(args: argparse.Namespace, store: RayKVStore, figures: dict[str, Any]) -> None:
    """VLLM has computed the prompts."""
    theirs, first = prompts(args, 1), prompts(args, 0)[0][:64]
    vllm(args, theirs, connector_of(args))
    wait_for(store, theirs)
    cold = engine_of(args, None)
    for mode in (AcceptMode.FULL, AcceptMode.EXACT):
        compute, warm = ComputePolicy(mode=mode), engine_of(args, store)
        ask(cold, first, compute)
        ask(warm, first, compute)
        tokens = []
        for kind, engine in (("no store", cold), ("prefix computed by vLLM", warm)):
            found = [ask(engine, ids, compute) for ids in theirs]
            row = f"Fathom `{mode.value}`, {kind}"
            show(figures["seconds"], row, [each for _, each in found])
            tokens.append([token for token, _ in found])
        cached = warm.stats()["kv_store_hits"]
        print(f"tokens that Fathom `{mode.value}` loaded: {cached} of {sum(map(len, theirs))}")
        figures["equal"][f"Fathom {mode.value}"] = [a == b for a, b in zip(*tokens, strict=True)]
        warm.close()


def connector_of(args: argparse.Namespace) -> dict[str, Any]:
    """The connector's settings: vLLM is given a path, the engines the model's name."""
    address = ray.get_runtime_context().gcs_address
    return {"ray_address": address, "store": STORE, "model": args.model}


def prompts(args: argparse.Namespace, kind: int) -> list[list[int]]:
    """Token ids of texts that share no beginning, other ones for each kind."""
    tokenizer = load_tokenizer(resolve_model(args.model))
    text = "".join(path.read_text() for path in (ROOT / "README.md", ROOT / "BENCHMARKS.md"))
    ids = tokenizer.encode(text)
    starts = range(kind * args.prompts * 700, (kind + 1) * args.prompts * 700, 700)
    return [ids[start : start + args.tokens] for start in starts]


def engine_of(args: argparse.Namespace, store: RayKVStore | None) -> Engine:
    """With a store, or without any reuse."""
    config = EngineConfig(
        model=args.model,
        dtype=args.dtype,
        threads=1,
        kv_cache_bytes=512 << 20,
        prefix_caching=store is not None,
    )
    return build_engine(config, store=store)


def ask(engine: Engine, ids: list[int], compute: ComputePolicy) -> tuple[int, float]:
    """The first token of an answer, and the seconds until it is there."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    begin = time.perf_counter()
    request = Request(
        request_id="one", prompt_token_ids=tuple(ids), sampling=sampling, compute=compute
    )
    engine.add_request(request)
    token, seconds = -1, 0.0
    while engine.has_work():
        for output in engine.step():
            if output.tokens:
                token, seconds = output.tokens[0].id, time.perf_counter() - begin
    return token, seconds


def wait_for(store: RayKVStore, asked: list[list[int]]) -> None:
    """Until no more blocks come, and those of these prompts are there, in both stages' chains."""
    wanted = 2 * sum((len(ids) - 1) // 16 for ids in asked)
    deadline = time.monotonic() + 60
    blocks, before = store.stats().blocks, -1
    while blocks < wanted or blocks > before:
        if time.monotonic() > deadline:
            raise SystemExit(f"{blocks} blocks are in the store, {wanted} are wanted")
        time.sleep(1)
        blocks, before = store.stats().blocks, blocks


def vllm(
    args: argparse.Namespace, asked: list[list[int]], connector: dict[str, Any] | None
) -> dict[str, Any]:
    """Answers of a vLLM process; see the worker."""
    settings = {
        "model": str(resolve_model(args.model)), "dtype": args.dtype, "prompts": asked,
        "new_tokens": 1, "connector": connector,
    }  # fmt: skip
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [args.vllm_python, str(WORKER), json.dumps(settings)],
        stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
