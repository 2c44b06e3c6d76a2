"""What a user is told of a server that does not come up."""

from __future__ import annotations

from deployments.cluster import reason_of

SERVE = (
    "Failed to update the deployments ['Engine']. Error: ray::ServeReplica:fathom:Engine."
    'initialize_and_get_metadata() (pid=1) File "replica.py", line 1928, in initialize raise '
    "RuntimeError(traceback.format_exc()) from None\nRuntimeError: Traceback (most recent call "
    'last):\n  File "operating_points.py", line 121, in check\n    raise ConfigError(\n'
)


def test_our_own_error_stands_alone() -> None:
    said = SERVE + "fathom.settings.ConfigError: points.yaml: measured on another adapter. Trace.\n"
    assert reason_of(said) == "points.yaml: measured on another adapter. Trace."


def test_the_innermost_error_is_the_reason() -> None:
    said = "fathom.models.errors.ModelError: outer\nfathom.settings.ConfigError: inner"
    assert reason_of(said) == "inner"


def test_other_words_are_kept_whole() -> None:
    assert reason_of(SERVE) == SERVE
    assert reason_of("") == ""
