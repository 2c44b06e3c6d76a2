"""Prompts of the small study: questions of our own making that no adapter was trained on."""

from __future__ import annotations

import json
from pathlib import Path

SUBJECTS = (
    "the lighthouse", "honey bees", "the violin", "tides", "the bicycle", "glaciers",
    "the telescope", "paper", "the Great Wall", "rice", "bridges", "the compass", "owls",
    "cement", "the calendar", "desert plants", "submarines", "cheese", "the piano", "rainbows",
    "railways", "penguins", "maps", "salt",
)  # fmt: skip
QUESTIONS = (
    "How would you describe {} to a ten-year-old?",
    "Name three things that most people do not know about {}.",
    "What would the world be like without {}?",
    "Write a short quiz with two questions about {}, and give the answers.",
)


def questions() -> list[str]:
    """All of them, neighbours of different kinds."""
    count = len(QUESTIONS)
    return [
        QUESTIONS[(place + turn) % count].format(subject)
        for turn in range(count)
        for place, subject in enumerate(SUBJECTS)
    ]


def write_prompts(path: Path, count: int) -> None:
    """Write the first ``count`` as a file of ``fathom generate --prompts``, whole or not at all."""
    lines = [
        json.dumps({"messages": [{"role": "user", "content": each}]}) + "\n"
        for each in questions()[:count]
    ]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(lines))
    partial.replace(path)
