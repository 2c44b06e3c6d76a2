"""The engine's own fixtures, with every deep stage at the far end of an exchange."""

from __future__ import annotations

from tests.unit.dataplane.conftest import decoder, exit_adapter, make_engine, model_dir, one_thread

__all__ = ["decoder", "exit_adapter", "make_engine", "model_dir", "one_thread"]
