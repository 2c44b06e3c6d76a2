"""The worker of vLLM: its engine in this process, stepped until a group is done."""

from __future__ import annotations

import importlib
import time
from typing import Any

from fathom.bench.measure import Prompts, Run, groups
from fathom.bench.peer_protocol import Runner, serve


class VllmRunner:
    """``LLM`` without prefix caching and without text: token ids in, token ids out."""

    def __init__(self, settings: dict[str, Any]) -> None:
        # Not imported by name: it is no dependency of ours, but of this process's environment.
        self._vllm: Any = importlib.import_module("vllm")
        self._engine: Any = self._vllm.LLM(
            model=settings["weights"],
            dtype=settings["dtype"],
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_num_seqs=settings["max_batch"],
            max_model_len=settings["max_model_len"],
            seed=0,
        ).llm_engine
        self._count = 0

    def run(self, prompts: Prompts, batch: int, new_tokens: int) -> Run:
        """See ``measure.Contender.run``."""
        run = Run()
        params = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=new_tokens,
            min_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        begin = time.perf_counter()
        for group in groups(prompts, batch):
            self._group(group, params, run)
        run.seconds = time.perf_counter() - begin
        return run

    def _group(self, group: Prompts, params: Any, run: Run) -> None:
        times: dict[str, list[float]] = {}
        ids: dict[str, list[int]] = {}
        start = time.perf_counter()
        for prompt in group:
            name = str(self._count)
            self._count += 1
            times[name], ids[name] = [], []
            self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                own = list(output.outputs[0].token_ids)
                new = len(own) - len(ids[output.request_id])
                ids[output.request_id] = own
                times[output.request_id] += [time.perf_counter()] * new
        for name, each in times.items():
            run.time_tokens(start, each)
            run.token_ids.append(ids[name])


def load(settings: dict[str, Any]) -> tuple[Runner, dict[str, Any]]:
    """See ``peer_protocol.serve``."""
    import torch

    torch.set_num_threads(settings["threads"])
    runner = VllmRunner(settings)
    torch.set_num_threads(settings["threads"])  # loading may have changed it
    versions = {"vllm": runner._vllm.__version__, "torch": torch.__version__}
    return runner, {"versions": versions}


if __name__ == "__main__":
    serve(load)
