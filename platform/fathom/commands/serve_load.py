"""What ``fathom bench serve`` asks for and shows: checked options, bodies, the table."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fathom.commands.options import UsageError
from fathom.commands.prompts import Prompt
from fathom.commands.reports import check_at_least_one

if TYPE_CHECKING:
    from fathom.bench.load_run import Load, Target

LIMITS = ("ttft", "tpot", "e2el")
Offered = tuple[float, int | None]
"""Requests a second, and most at once."""

_TABLE_WIDTH = 150


def check_load_options(args: argparse.Namespace) -> None:
    """Check what can be checked before a server is asked.

    Raises:
        UsageError: naming the option, its value and the remedy.
    """
    check_at_least_one(args, "num_prompts", "input_len", "output_len")
    if args.max_concurrency is not None:
        check_at_least_one(args, "max_concurrency")
    for name in ("request_rate", "burstiness", "timeout"):
        if not getattr(args, name) > 0:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} must be above 0, got {getattr(args, name):g}.")
    if args.num_warmups < 0:
        raise UsageError(f"--num-warmups must be at least 0, got {args.num_warmups}.")
    if not args.base_url.startswith(("http://", "https://")):
        raise UsageError(f"--base-url must be as http://127.0.0.1:8000, got {args.base_url!r}.")
    if not args.endpoint.endswith("/completions"):
        raise UsageError(
            f"--endpoint must be /v1/completions or /v1/chat/completions, got {args.endpoint!r}."
        )
    if args.vocab_size is not None and args.endpoint.endswith("/chat/completions"):
        raise UsageError("--vocab-size makes prompts of token ids: add --endpoint /v1/completions.")
    if args.plot is not None and not args.sweep:
        raise UsageError("--plot draws a sweep: add --sweep 1,2,4.")


def offered_loads(args: argparse.Namespace) -> list[Offered]:
    """The loads of the run, one without ``--sweep``.

    Raises:
        UsageError: for a value of ``--sweep`` that is no rate, or no concurrency.
    """
    if args.sweep is None:
        return [(args.request_rate, args.max_concurrency)]
    by_rate = args.sweep_over == "request-rate"
    try:
        values = [float(part) for part in args.sweep.split(",")]
    except ValueError:
        values = [0.0]
    if not all(math.isfinite(v) and v > 0 and (by_rate or v == int(v)) for v in values):
        kind = "rates above 0" if by_rate else "integers of at least 1"
        raise UsageError(f"--sweep must be a list of {kind}, got {args.sweep!r}.")
    if by_rate:
        return [(value, args.max_concurrency) for value in values]
    return [(args.request_rate, int(value)) for value in values]


def limits(given: Sequence[str] | None) -> dict[str, float]:
    """The limits of ``--goodput``, in ms: several words, or one with commas.

    Raises:
        UsageError: for what is not of the form.
    """
    found: dict[str, float] = {}
    for part in ",".join(given or ()).split(","):
        name, _, value = part.partition(":")
        name = {"e2e": "e2el"}.get(name, name)
        try:
            found[name] = float(value) if part else 0.0
        except ValueError:
            found[name] = 0.0
        if part and (name not in LIMITS or not found[name] > 0):
            raise UsageError(f"--goodput must be as ttft:500,tpot:50,e2el:3000 (ms), got {part!r}.")
    found.pop("", None)
    return found


def percentile_list(text: str) -> list[float]:
    """The percentiles of ``--metric-percentiles``, 50 and 99 always among them.

    Raises:
        UsageError: for what is none.
    """
    try:
        found = {float(part) for part in text.split(",")}
    except ValueError:
        found = {-1.0}
    if not all(0 <= each <= 100 for each in found):
        raise UsageError(
            f"--metric-percentiles must be a list of numbers from 0 to 100, got {text!r}."
        )
    return sorted(found | {50.0, 99.0})


def extra_body(text: str | None) -> dict[str, Any]:
    """The object of ``--extra-body``.

    Raises:
        UsageError: if it is none.
    """
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise UsageError(f"--extra-body is no valid JSON ({error.msg}): {text!r}.") from error
    if not isinstance(value, dict):
        raise UsageError(f'--extra-body must be an object, as {{"top_p": 0.9}}, got {text!r}.')
    return value


def first_model(target: Target) -> str:
    """The first model that a server lists.

    Raises:
        RuntimeError: if it cannot be asked, or lists none.
    """
    import httpx

    url = f"{target.base_url}/v1/models"
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    try:
        answer = httpx.get(url, headers=headers, timeout=30, trust_env=False).raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise RuntimeError(f"{url}: no list of models ({error}); name one with --model.") from error


def run_one(
    args: argparse.Namespace,
    target: Target,
    model: str,
    given: Sequence[Prompt] | None,
    extra: Mapping[str, Any],
    offered: Offered,
    number: int,
    notes: Any,
) -> Load:
    """Warm up, and put one load on the server.

    Args:
        number: of the load; each has prompts of its own, which no prefix cache has seen.

    Raises:
        UsageError: for prompts that the endpoint does not take.
    """
    from rich.progress import Progress

    from fathom.bench.load_prompts import Prompt as Content
    from fathom.bench.load_prompts import bodies_of, random_prompts
    from fathom.bench.load_run import run_load
    from fathom.bench.load_schedule import arrival_times

    rate, concurrency = offered
    count = args.num_prompts + args.num_warmups
    if given is None:
        seed = f"{args.seed} {number}"
        prompts = random_prompts(count, args.input_len, seed=seed, vocab_size=args.vocab_size)
    else:
        contents: list[Content] = [each.text or list(each.messages or ()) for each in given]
        prompts = [contents[index % len(contents)] for index in range(count)]
    try:
        bodies = bodies_of(
            prompts, endpoint=target.endpoint, model=model, output_len=args.output_len,
            ignore_eos=args.ignore_eos, extra=extra,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"{error}") from error
    if args.num_warmups:
        run_load(target, bodies[args.num_prompts :], None, max_concurrency=concurrency)
    times = None
    if not math.isinf(rate):
        times = arrival_times(
            args.num_prompts, rate, burstiness=args.burstiness, seed=args.seed + number
        )
    name = f"{rate:g} requests/s" if times else f"{concurrency or 'all'} at once"
    with Progress(console=notes) as bar:
        task = bar.add_task(name, total=args.num_prompts)
        return run_load(
            target, bodies[: args.num_prompts], times,
            max_concurrency=concurrency, on_end=lambda answer: bar.advance(task),
        )  # fmt: skip


_COLUMNS = (
    ("done", "completed", "{}"),
    ("failed", "failed", "{}"),
    ("req/s", "request_throughput", "{:.2f}"),
    ("goodput", "request_goodput", "{:.2f}"),
    ("tok/s", "output_throughput", "{:.1f}"),
    ("TTFT p50", "p50_ttft_ms", "{:.0f} ms"),
    ("p99", "p99_ttft_ms", "{:.0f} ms"),
    ("TPOT p50", "p50_tpot_ms", "{:.1f} ms"),
    ("p99", "p99_tpot_ms", "{:.1f} ms"),
    ("ITL p99", "p99_itl_ms", "{:.1f} ms"),
    ("E2EL p50", "p50_e2el_ms", "{:.0f} ms"),
    ("p99", "p99_e2el_ms", "{:.0f} ms"),
)


def print_rows(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """The rows as a table, with errors, the generator's own lateness, and Fathom's depth."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("rate", "at once", *(heading for heading, _, _ in _COLUMNS)):
        table.add_column(heading, justify="right")
    for row in rows:
        rate, most = row["request_rate"], row["max_concurrency"]
        cells = ["–" if row[name] is None else form.format(row[name]) for _, name, form in _COLUMNS]
        table.add_row("inf" if rate is None else f"{rate:g}", str(most or "any"), *cells)
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(table)
    for row in rows:
        for kind, count in row["errors"].items():
            words = f"{count} x {kind}: {row['error_samples'][kind]}"
            console.print(words, markup=False, highlight=False, soft_wrap=True)
    console.print(_client_line(rows), highlight=False, soft_wrap=True)
    if any(row["tokens_counted_by"] == "chunks" for row in rows):
        console.print("The server tells no usage: tokens are chunks of the streams.")
    told = rows[-1]["compute"]
    if told and told["layers_per_token"] is not None:
        exits = told["exit_rate"]
        share = "" if exits is None else f", {exits:.0%} of tokens left early"
        console.print(f"depth: {told['layers_per_token']:.1f} layers/token{share}", highlight=False)


def _client_line(rows: Sequence[Mapping[str, Any]]) -> str:
    clients = [row["client"] for row in rows]
    late = [
        client["send_lag_ms_p99"] for client in clients if client["send_lag_ms_p99"] is not None
    ]
    loop = max(client["loop_lag_ms_p99"] or 0.0 for client in clients)
    share = max(client["cpu_share"] for client in clients)
    sent = f"requests left up to {max(late):.1f} ms late (p99), " if late else ""
    return f"client: {sent}its loop {loop:.1f} ms (p99), {share:.0%} of a core"
