"""Traces of a made-up exit head whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from fathom.engine.trace import DraftRecord
from fathom.exits.calibration import TEMPERATURES
from fathom.exits.confidence import softmax_gap
from fathom.tuning.traces import TraceWriter

VOCAB = 50
WIDTH = 8

METADATA = {
    "model": "tiny",
    "weights_digest": "weights-1",
    "adapter": "small",
    "adapter_digest": "adapter-1",
    "exit_layer": "2",
    "exit_depth": "3",
    "exit_vocab": str(VOCAB),
    "num_layers": "6",
    "dtype": "float32",
    "exit_cost": "0.25",
    "stage_costs_ms": json.dumps(
        {"shallow": {"1": 1.0}, "shallow_full": {"1": 0.9}, "deep": {"1": 3.0, "8": 3.5}}
    ),
}


def made_up_logits(requests: int, tokens: int, scale: float, seed: int) -> torch.Tensor:
    """[requests * tokens, VOCAB] float32, sure at some rows and unsure at others."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(requests * tokens, VOCAB, generator=random)
    return logits * scale * torch.rand(requests * tokens, 1, generator=random) * 3


def write_trace(
    path: Path,
    *,
    requests: int = 60,
    tokens: int = 20,
    temperature: float = 1.0,
    scale: float = 2.0,
    seed: int = 0,
    hidden: bool = False,
    exited: bool = False,
    **metadata: str,
) -> torch.Tensor:
    """Write a trace whose deep choices are drawn from the exit head's own softmax.

    Args:
        temperature: that the head's logits must be divided by to be calibrated.
        hidden: with exit states, of which the first component tells of agreement.

    Returns:
        the logits, [rows, VOCAB], request by request.
    """
    logits = made_up_logits(requests, tokens, scale, seed)
    random = np.random.default_rng(seed)
    chances = (logits / temperature).softmax(-1).double().numpy()
    deep = [int(random.choice(VOCAB, p=row / row.sum())) for row in chances]
    gaps, best = softmax_gap(logits)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    lse = torch.stack([(logits / t).logsumexp(-1) for t in TEMPERATURES], dim=1)
    top = logits.topk(2).values
    with TraceWriter(path, {**METADATA, **metadata}) as trace:
        for row in range(len(logits)):
            agrees = int(best[row]) == deep[row]
            state = random.normal(size=WIDTH)
            state[0] += 3 if agrees else -3
            trace.add(
                DraftRecord(
                    request_id=f"r{row // tokens}",
                    index=0,
                    position=5 + row % tokens,
                    num_prompt=6,
                    confidence=float(gaps[row]),
                    entropy=float(entropy[row]),
                    shallow_token=int(best[row]),
                    deep_token=deep[row],
                    exited=exited,
                    max_prob=float(log_p[row].max().exp()),
                    saturation=float(random.random()),
                    best_logit=float(top[row, 0]),
                    second_logit=float(top[row, 1]),
                    deep_logit=float(logits[row, deep[row]]),
                    lse=tuple(lse[row].tolist()),
                    hidden=state.astype("<f2").tobytes() if hidden else None,
                )
            )
    return logits
