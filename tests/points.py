"""Operating points of a model that nobody has traced: made-up rows, real tables and files."""

from __future__ import annotations

import numpy as np

from fathom.engine.info import EngineInfo
from fathom.exits.risk import losses
from fathom.tuning.loss_table import grid
from fathom.tuning.operating_points import Calibration, Identity, OperatingPoints, Point
from fathom.types import AcceptMode, ComputePolicy, Confidence, PolicyName

INFO = EngineInfo(
    model="tiny",
    adapter="",
    adapter_digest="",
    num_layers=4,
    exit_layer=2,
    exit_depth=2,
    exit_vocab=257,
    vocab_size=257,
    max_model_len=128,
    dtype="float32",
    eos_token_ids=(256,),
    weights_digest="w",
    num_blocks=64,
    block_size=16,
)


def points_of(
    info: EngineInfo = INFO, *, requests: int = 400, exit_cost: float = 0.5, seed: int = 0
) -> OperatingPoints:
    """Points ``exact``, ``balanced``, ``fast``, and a user's own ``draft`` and ``sketch``.

    The rows that they are calibrated on: of each request 30, of which four in five are sure and
    nearly always right.
    """
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(requests), 30)
    sure = rng.random(len(groups)) < 0.8
    confidence = np.where(sure, rng.beta(30, 1, len(groups)), rng.beta(2, 3, len(groups)))
    agrees = rng.random(len(groups)) < np.where(sure, 0.998, 0.4)
    table = losses(confidence, agrees, groups, grid=grid())
    free = AcceptMode.FREE
    points = {
        "exact": Point(ComputePolicy(operating_point="exact", exit_threshold=0.4)),
        "balanced": Point(
            ComputePolicy(operating_point="balanced", mode=free, policy=PolicyName.RISK, risk=0.05),
            {"agreement": 0.97, "budget": 0.8},
        ),
        "fast": Point(
            ComputePolicy(operating_point="fast", mode=free, policy=PolicyName.BUDGET, budget=0.7),
            {"agreement": 0.9, "budget": 0.7},
            "made up",
        ),
        "draft": Point(
            ComputePolicy(operating_point="draft", mode=free, exit_threshold=0.5),
            {"budget": 0.66},
        ),
        "sketch": Point(
            ComputePolicy(operating_point="sketch", mode=free, exit_threshold=0.1),
            {"budget": 0.61},
        ),
    }
    identity = Identity(
        model=info.model,
        weights_digest=info.weights_digest,
        adapter=info.adapter,
        adapter_digest=info.adapter_digest,
        exit_layer=info.exit_layer,
        exit_vocab=info.exit_vocab,
        dtype=info.dtype,
        exit_cost=exit_cost,
        trace="made-up.parquet",
        trace_sha256="0" * 64,
    )
    calibration = Calibration(Confidence.SOFTMAX_GAP, 1.25, table)
    return OperatingPoints("points.yaml", identity, points, calibration)
