"""The engine's own probe: the exit head asked at every decision row, none of which leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fathom.engine.trace import DraftRecord
from fathom.evaluation.agreement import Drafts
from fathom.evaluation.answers import generate
from fathom.types import AcceptMode, ComputePolicy, PolicyName, Request

if TYPE_CHECKING:
    from fathom.engine.engine import Engine

# No confidence exceeds 1, so every row goes on to the deep stage. Not mode exact: it shows the
# first token at full depth without asking the head.
_ASK_ALL = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.THRESHOLD, exit_threshold=1.0)


def traced_drafts(engine: Engine, requests: Sequence[Request]) -> Drafts:
    """Answer the requests at full depth, the exit head asked at each row; see ``Probe``."""
    found: list[DraftRecord] = []
    engine.trace(found.append)
    try:
        asking = [dataclasses.replace(request, compute=_ASK_ALL) for request in requests]
        generate(engine, asking, lambda: None)
    finally:
        engine.trace(None)
    return found
