"""What a peer's worker does: load, say so, then answer one line for each line that it is given.

Runs in the peer's own environment: the standard library and ``bench.measure`` alone.

Lines on standard input are ``{"prompts": [[id, ...], ...], "batch": B, "new_tokens": N}``. Lines on
standard output are ``{"ready": {...}}`` once, then for each run ``{"run": {"seconds", "ttft",
"tpot", "token_ids"}}``, or ``{"error": text}``, which is the last.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from fathom.bench.measure import Prompts, Run


class Runner(Protocol):
    """A peer that has loaded its weights; see ``measure.Contender.run``."""

    def run(self, prompts: Prompts, batch: int, new_tokens: int) -> Run:
        """Generate exactly ``new_tokens`` tokens for every prompt, greedily."""
        ...


def serve(load: Callable[[dict[str, Any]], tuple[Runner, dict[str, Any]]]) -> None:
    """Run a worker until standard input ends.

    Args:
        load: takes the settings of the command line (a JSON object: ``weights``, ``dtype``,
            ``threads``, ``max_batch``, ``max_model_len``, ``pad_token_id``), returns the peer and
            what is worth knowing of it.
    """
    # What libraries print must not get between our lines.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        runner, about = load(json.loads(sys.argv[1]))
        say(ready=about)
        for line in sys.stdin:
            say(run=_answer(runner, json.loads(line)))
    except Exception as error:
        traceback.print_exc()
        say(error=f"{type(error).__name__}: {error}")
        sys.exit(1)


def _answer(runner: Runner, asked: dict[str, Any]) -> dict[str, Any]:
    prompts = [tuple(ids) for ids in asked["prompts"]]
    run = runner.run(prompts, asked["batch"], asked["new_tokens"])
    return {
        "seconds": run.seconds,
        "ttft": run.ttft,
        "tpot": run.tpot,
        "token_ids": run.token_ids,
    }
