"""What each accept mode promises holds over a remote deep stage as well."""

from __future__ import annotations

from tests.unit.engine.test_modes import *  # noqa: F403
