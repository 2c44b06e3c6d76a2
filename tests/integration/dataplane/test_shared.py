"""Shared prefixes, word for word, where the deep stage loads and publishes at the far end."""

from __future__ import annotations

from tests.unit.engine.test_shared_prefixes import *  # noqa: F403
