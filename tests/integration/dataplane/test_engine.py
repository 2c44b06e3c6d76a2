"""The engine's tests, word for word, over a remote deep stage: remote flush equals local flush."""

from __future__ import annotations

from tests.unit.engine.test_engine import *  # noqa: F403
