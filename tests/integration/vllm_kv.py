"""Run by an interpreter that has vLLM, Ray and Fathom: greedy answers, with a KV connector or none.

    python vllm_kv.py SETTINGS

SETTINGS is a JSON object: ``model``, ``dtype``, ``prompts`` (token ids), ``new_tokens``,
``connector`` (a ``kv_connector_extra_config``, or null) and ``options`` (other ones of vLLM's
``LLM``). Writes one to standard output: ``answers``, ``seconds`` until each one's first token, and
``hits``, tokens of each prompt that came from the connector.
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
    from vllm import LLM, SamplingParams

    transfer = None
    if settings["connector"] is not None:
        transfer = {
            "kv_connector": "FathomConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": settings["connector"],
        }
    engine = LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        max_num_seqs=4,
        max_model_len=2048,
        kv_transfer_config=transfer,
        disable_log_stats=False,
        seed=0,
        **settings.get("options", {}),
    )

    def ask(ids: list[int], tokens: int) -> list[int]:
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        done = engine.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
        return list(done[0].outputs[0].token_ids)

    ask([ids + 1 for ids in settings["prompts"][0]], 2)  # compiles what is left to compile
    answers, seconds, hits = [], [], []
    for ids in settings["prompts"]:
        before, begin = _hits(engine), time.perf_counter()
        ask(ids, 1)
        seconds.append(time.perf_counter() - begin)
        hits.append(_hits(engine) - before)
        answers.append(ask(ids, settings["new_tokens"]))
    time.sleep(settings.get("linger", 2))  # what is stored goes on behind the answers
    found = {"answers": answers, "seconds": seconds, "hits": hits}
    print(json.dumps(found), file=out, flush=True)


def _hits(engine: Any) -> int:
    name = "vllm:external_prefix_cache_hits"
    return sum(int(metric.value) for metric in engine.get_metrics() if metric.name == name)


if __name__ == "__main__":
    main()
