"""The worker of llama.cpp: ``llama_decode`` over all sequences of a group, the argmax of each."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fathom.bench.measure import Prompts, Run, groups
from fathom.bench.peer_protocol import Runner, serve

_MAX_BATCH_TOKENS = 2048


class LlamaCppRunner:
    """The C API by way of llama-cpp-python, whose own classes run one sequence at a time."""

    def __init__(self, settings: dict[str, Any]) -> None:
        # Not imported by name: it is no dependency of ours, but of this process's environment.
        self._api = api = importlib.import_module("llama_cpp")
        api.llama_backend_init()
        model = api.llama_model_load_from_file(
            str(settings["weights"]).encode(), api.llama_model_default_params()
        )
        if not model:
            raise RuntimeError(f"{settings['weights']}: llama.cpp cannot load it.")
        params = api.llama_context_default_params()
        params.n_ctx = settings["max_model_len"] * settings["max_batch"]
        params.n_batch = _MAX_BATCH_TOKENS
        params.n_seq_max = settings["max_batch"]
        params.n_threads = params.n_threads_batch = settings["threads"]
        self._context = api.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context of these sizes.")
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(_MAX_BATCH_TOKENS, 0, 1)

    def run(self, prompts: Prompts, batch: int, new_tokens: int) -> Run:
        """See ``measure.Contender.run``."""
        run = Run()
        begin = time.perf_counter()
        for group in groups(prompts, batch):
            self._group(group, new_tokens, run)
        run.seconds = time.perf_counter() - begin
        return run

    def _group(self, group: Prompts, new_tokens: int, run: Run) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        start = time.perf_counter()
        last = self._prefill(group)
        ids = [[token] for token in last]
        times = [time.perf_counter()]
        for step in range(new_tokens - 1):
            rows = [
                (token, len(prompt) + step, sequence, True)
                for sequence, (token, prompt) in enumerate(zip(last, group, strict=True))
            ]
            last = self._decode(rows)
            times.append(time.perf_counter())
            for own, token in zip(ids, last, strict=True):
                own.append(token)
        for own in ids:
            run.time_tokens(start, times)
            run.token_ids.append(own)

    def _prefill(self, group: Prompts) -> list[int]:
        """All prompts, as many rows at once as a batch holds; returns the first new tokens."""
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(group)
            for position, token in enumerate(prompt)
        ]
        found: list[int] = []
        for first in range(0, len(rows), _MAX_BATCH_TOKENS):
            found += self._decode(rows[first : first + _MAX_BATCH_TOKENS])
        return found

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Run rows (token, position, sequence, whether its logits are wanted).

        Returns:
            the most likely next tokens of those whose logits were wanted, in order.
        """
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = wanted
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code} for {len(rows)} rows.")
        return [self._best(row) for row, each in enumerate(rows) if each[3]]

    def _best(self, row: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


def load(settings: dict[str, Any]) -> tuple[Runner, dict[str, Any]]:
    """See ``peer_protocol.serve``."""
    runner = LlamaCppRunner(settings)
    about = {
        "versions": {"llama-cpp-python": runner._api.__version__},
        "system": runner._api.llama_print_system_info().decode(),
    }
    return runner, about


if __name__ == "__main__":
    serve(load)
