"""A real engine over a tiny random model with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from fathom.config import EngineConfig
from fathom.engine.engine import Engine
from fathom.engine.trace import DraftRecord
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Engine:
    return Engine.from_config(
        EngineConfig(
            model=str(tiny_model),
            dtype="float32",
            threads=1,
            kv_cache_bytes=4 << 20,
            pause_drafting=False,  # depths must not depend on speed
            exit_layer=2,
            adapter="none",
            max_num_seqs=4,
            prefix_caching=False,
        )
    )


def draft(confidence: float, agrees: bool) -> DraftRecord:
    """What a probe tells of one row."""
    return DraftRecord("0", 0, 3, 2, confidence, 0.1, 7, 7 if agrees else 8, False)
