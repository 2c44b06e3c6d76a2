"""Prompts are scored over a remote deep stage as they are here."""

from __future__ import annotations

from tests.unit.engine.test_scoring import *  # noqa: F403
