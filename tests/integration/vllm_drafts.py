"""Run by an interpreter that has vLLM: greedy answers, with and without a draft model.

    python vllm_drafts.py SETTINGS

SETTINGS is a JSON object: ``model``, ``dtype``, ``prompts`` (token ids), ``new_tokens``, and
``speculative`` (a ``speculative_config``, or null). Writes one to standard output: ``answers``,
``seconds`` of each, and what drafting came to: ``drafts``, ``drafted``, ``accepted`` and
``accepted_at`` (by place in the draft). Nothing of Fathom is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")  # what libraries print must not get in between
    os.dup2(2, 1)
    import torch
    from vllm import LLM, SamplingParams

    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    engine = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        speculative_config=settings["speculative"],
        enable_prefix_caching=False,
        max_num_seqs=2,
        max_model_len=512,
        disable_log_stats=False,
        seed=0,
    )
    torch.set_num_threads(threads)  # loading may have changed it
    params = SamplingParams(
        temperature=0.0, max_tokens=settings["new_tokens"], ignore_eos=True, detokenize=False
    )

    def answer(ids: list[int]) -> list[int]:
        done = engine.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
        return list(done[0].outputs[0].token_ids)

    answer(settings["prompts"][0])  # compiles what is left to compile
    before = _counts(engine)
    answers, seconds = [], []
    for ids in settings["prompts"]:
        begin = time.perf_counter()
        answers.append(answer(ids))
        seconds.append(time.perf_counter() - begin)
    after = _counts(engine)
    found: dict[str, Any] = {"answers": answers, "seconds": seconds}
    for name, value in after.items():
        base = before[name]
        found[name] = (
            [a - b for a, b in zip(value, base, strict=True)]
            if isinstance(value, list)
            else value - base
        )
    print(json.dumps(found), file=out, flush=True)


def _counts(engine: Any) -> dict[str, Any]:
    names = {
        "vllm:spec_decode_num_drafts": "drafts",
        "vllm:spec_decode_num_draft_tokens": "drafted",
        "vllm:spec_decode_num_accepted_tokens": "accepted",
        "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_at",
    }
    return {
        names[metric.name]: list(metric.values) if hasattr(metric, "values") else metric.value
        for metric in engine.get_metrics()
        if metric.name in names
    }


if __name__ == "__main__":
    main()
