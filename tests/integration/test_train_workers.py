"""Training on several workers through Ray Train: one adapter, whoever made it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fathom.models.adapters import read_adapter
from fathom.training.examples import Example
from fathom.training.exits import ExitTraining
from fathom.training.model import Shape
from fathom.training.objective import TrainSettings
from fathom.training.workers import train_on_workers
from tests.ray_fixtures import TestServer
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]


def test_two_workers_train_one_adapter(
    server: TestServer, tiny_model: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(tuple(torch.randint(0, 256, (12,), generator=generator).tolist()), 4)
        for _ in range(32)
    ]
    plan = ExitTraining(
        name="tiny",
        model=str(tiny_model),
        shape=Shape(exit_layer=1, exit_layers=1, tune="exit", head_adapter=True),
        subset=64,
        settings=TrainSettings(steps=4, batch_tokens=96, learning_rate=1e-2, check_every=2),
    )
    out = train_on_workers(
        plan,
        examples,
        examples[:8],
        tmp_path / "run",
        out=tmp_path / "out",
        workers=2,
        threads=1,
        mlflow_uri="none",
    )
    adapter = read_adapter(out)
    assert (adapter.exit_layer, adapter.exit_layers) == (1, 1)
    assert json.loads(adapter.metadata["training"])["examples"] == 32
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 4
    # Both saw half of each epoch's batches: 4 steps of 2 batches are one epoch of 4 and more.
    assert state["progress"]["epoch"] >= 1
    assert torch.isfinite(adapter.norm).all()
