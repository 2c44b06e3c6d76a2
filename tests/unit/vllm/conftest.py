from __future__ import annotations

from tests.unit.engine.conftest import decoder, exit_adapter, make_engine, model_dir

__all__ = ["decoder", "exit_adapter", "make_engine", "model_dir"]
