"""What requests get when operating points are promoted on a service, and taken back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fathom.api.convert import Defaults
from fathom.api.local import LocalBackend
from fathom.api.points import standing
from fathom.api.promotion import Promoted, Promotion, promoted_of
from fathom.api.service import Service
from fathom.config import ConfigError
from fathom.engine.async_engine import AsyncEngine
from fathom.models.tokenizer import Tokenizer
from fathom.tuning.operating_points import OperatingPoints
from fathom.types import ComputePolicy, InvalidRequest
from tests.points import points_of

POINTS = points_of()
STARTED = ComputePolicy(exit_threshold=0.3)


def promotion(default: str | None, points: OperatingPoints = POINTS) -> Promotion:
    return Promotion(points, default, points.digest)


@pytest.fixture
def service(engine: AsyncEngine, tokenizer: Tokenizer) -> Service:
    return Service(
        backend=LocalBackend(engine, interval_s=0.0),
        tokenizer=tokenizer,
        model_name="tiny",
        defaults=Defaults(compute=STARTED, timeout_s=60),
    )


def test_requests_get_what_was_promoted_and_then_what_was_before(service: Service) -> None:
    started = Promoted()
    first = started.promote(promotion("draft"))
    second = first.promote(promotion("fast"))
    for promoted, wanted in (
        (started, STARTED),
        (first, POINTS.resolve("draft")),
        (second, POINTS.resolve("fast")),
        (second.rolled_back(), POINTS.resolve("draft")),
        (second.rolled_back().rolled_back(), POINTS.resolve("fast")),
        (first.rolled_back(), STARTED),
    ):
        # As Serve passes it on: JSON.
        service.take(promoted_of(json.loads(json.dumps(promoted.as_dict()))))
        assert service.default_compute == wanted
        body = standing(service)
        assert body["default"] == (wanted.operating_point or None)
        assert body["digest"] == (POINTS.digest if promoted.current else None)
        assert len(body["data"]) == (len(POINTS.points) if promoted.current else 0)
        assert body["can_roll_back"] == (promoted is not started)
    revisions = {each.revision for each in (first, second, second.rolled_back())}
    assert len(revisions) == 3


def test_the_same_again_changes_nothing() -> None:
    first = Promoted().promote(promotion("draft"))
    assert first.promote(promotion("draft", points_of())) is first
    assert first.promote(promotion("fast")) is not first
    with pytest.raises(InvalidRequest, match="nothing was promoted"):
        Promoted().rolled_back()


def test_without_a_default_the_server_keeps_its_own(service: Service) -> None:
    service.take(Promoted().promote(promotion(None)))
    assert service.default_compute == STARTED
    assert service.points is not None
    # One that is a point by the same name and setting stays one; another's name is not taken.
    own = POINTS.resolve("draft")
    assert promotion(None).default_compute(own) == own
    other = dataclasses.replace(own, exit_threshold=0.77)
    assert promotion(None).default_compute(other) == dataclasses.replace(other, operating_point="")


def test_a_point_that_cannot_be_taken_leaves_all_as_it_was(service: Service) -> None:
    service.take(before := Promoted().promote(promotion("draft")))
    with pytest.raises(ConfigError, match="operating_point must be one of"):
        service.take(before.promote(promotion("none")))
    assert service.promoted is before
    assert service.default_compute == POINTS.resolve("draft")
