"""What the terminal says of a mode."""

from __future__ import annotations

import pytest

from fathom.commands.terminal import describe_mode


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("full", "full (lossless)"),
        ("exact@0.3", "exact@0.3 (lossless)"),
        ("free@0.9", "free@0.9 (lossy)"),
        ("static", "static (lossy)"),
    ],
)
def test_modes_say_whether_they_are_lossless(mode: str, words: str) -> None:
    assert describe_mode(mode) == words
