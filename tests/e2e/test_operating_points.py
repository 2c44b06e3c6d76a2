"""Operating points, budgets, risks and efforts through the official client, on a real server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai as sdk
import pytest
from openai import OpenAI
from ray import serve

from fathom.config import EngineConfig
from fathom.engine.build import build_engine
from fathom.tuning.operating_points import OperatingPoints
from tests.points import points_of
from tests.ray_fixtures import KEYS, TestServer

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def points(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> OperatingPoints:
    """Points of the tiny model, in a file."""
    engine = build_engine(settings(tiny_model))
    made = points_of(engine.info, exit_cost=engine.ledger.costs.exit_cost)
    made.save(tmp_path_factory.mktemp("points") / "points.yaml")
    return made


def settings(model: Path) -> EngineConfig:
    return EngineConfig(
        model=str(model), dtype="float32", kv_cache_bytes=4 << 20, exit_layer=2, adapter="none"
    )


@pytest.fixture(scope="module")
def served(
    server: TestServer, tiny_model: Path, points: OperatingPoints, tmp_path_factory: Any
) -> Iterator[TestServer]:
    from deployments.app import build

    path = tmp_path_factory.mktemp("served") / "points.yaml"
    points.save(path)
    application = build(
        {
            "engine": {
                "model": str(tiny_model),
                "dtype": "float32",
                "kv_cache_bytes": 4 << 20,
                "exit_layer": 2,
                "adapter": "none",
                "max_num_seqs": 1,
            },
            "operating_points": str(path),
            "load_aware": {"enabled": True, "waiting": 1, "rise_s": 0.001, "fall_s": 0.5},
            "cpus_per_replica": 0.5,
            "drain_s": 1,
        }
    )
    serve.run(application, name="points", route_prefix="/points")
    yield TestServer(url=f"{server.url}/points", model=str(tiny_model))
    serve.delete("points")


@pytest.fixture(scope="module")
def client(served: TestServer) -> OpenAI:
    return served.openai()


def ask(client: OpenAI, served: TestServer, **fields: Any) -> dict[str, Any]:
    """The answer's ``usage.compute``."""
    fields = {"max_tokens": 24, "temperature": 0, "messages": QUESTION, **fields}
    fields["extra_body"] = {"ignore_eos": True, **fields.get("extra_body", {})}
    answer = client.chat.completions.create(model=served.model, **fields)
    assert answer.usage is not None
    return dict((answer.usage.model_extra or {})["compute"])


def refused(client: OpenAI, served: TestServer, param: str, *words: str, **fields: Any) -> None:
    with pytest.raises(sdk.BadRequestError) as error:
        ask(client, served, **fields)
    assert error.value.param == param
    for word in words:
        assert word in error.value.message


def test_a_point_by_its_name(client: OpenAI, served: TestServer) -> None:
    usage = ask(client, served, extra_body={"compute": {"operating_point": "draft"}})
    assert (usage["mode"], usage["operating_point"]) == ("free", "draft")
    assert usage["requested_budget"] is None
    assert (usage["probes"], usage["load_shifted"]) == (0, 0)
    text = client.completions.create(
        model=served.model,
        prompt="abc",
        max_tokens=4,
        extra_body={"compute": {"operating_point": "fast"}},
    )
    assert text.usage is not None
    assert (text.usage.model_extra or {})["compute"]["operating_point"] == "fast"
    refused(client, served, "compute.operating_point", "exact, balanced, fast", "'fastest'",
            extra_body={"compute": {"operating_point": "fastest"}})  # fmt: skip


@pytest.mark.parametrize(
    ("effort", "point", "mode"),
    [("low", "fast", "free"), ("medium", "balanced", "free"), ("high", "exact", "exact")],
)
def test_efforts_are_points(
    client: OpenAI, served: TestServer, effort: Any, point: str, mode: str
) -> None:
    usage = ask(client, served, reasoning_effort=effort)
    assert (usage["operating_point"], usage["mode"]) == (point, mode)
    text = client.completions.create(
        model=served.model, prompt="a", max_tokens=2, extra_body={"reasoning_effort": effort}
    )
    assert text.usage is not None
    assert (text.usage.model_extra or {})["compute"]["operating_point"] == point


def test_a_budget_is_spent_and_told(
    client: OpenAI, served: TestServer, points: OperatingPoints
) -> None:
    """A random model is never sure, so only the quantiles of what was seen can spend a budget."""
    cost = points.identity.exit_cost
    least = 1 - 8 / 9 * (1 - cost)
    budget = round((1 + least) / 2, 2)
    body = {"compute": {"budget": budget}}
    for _ in range(4):
        usage = ask(client, served, extra_body=body, max_tokens=60)
        assert (usage["mode"], usage["requested_budget"]) == ("free", budget)
        exits = usage["exited"] / usage["decided"]
        assert usage["realised_budget"] == pytest.approx(1 - exits * (1 - cost), abs=1e-6)
    assert usage["realised_budget"] == pytest.approx(budget, abs=0.06)
    refused(client, served, "compute.budget", f"at least {least:.3f}"[:-1],
            extra_body={"compute": {"budget": round(least - 0.1, 3)}})  # fmt: skip
    refused(client, served, "compute.risk", "compute.budget",
            extra_body={"compute": {"budget": 0.9, "risk": 0.05}})  # fmt: skip
    refused(client, served, "compute.budget", "compute.operating_point",
            extra_body={"compute": {"budget": 0.9, "operating_point": "fast"}})  # fmt: skip


def test_a_risk_is_certified_or_refused(
    client: OpenAI, served: TestServer, server: TestServer
) -> None:
    usage = ask(client, served, extra_body={"compute": {"risk": 0.05}})
    assert (usage["mode"], usage["operating_point"]) == ("free", "")
    refused(client, served, "compute.risk", "from 400 requests", "would do",
            extra_body={"compute": {"risk": 0.001, "risk_confidence": 0.999}})  # fmt: skip
    # The other server has no file.
    with pytest.raises(sdk.BadRequestError) as error:
        ask(server.openai(), server, extra_body={"compute": {"risk": 0.05}})
    assert error.value.param == "compute.risk"
    assert "fathom calibrate fit" in error.value.message


def test_what_is_no_effort_and_no_field(client: OpenAI, served: TestServer) -> None:
    refused(client, served, "reasoning_effort", "low, medium, high, got 'minimal'",
            reasoning_effort="minimal")  # fmt: skip
    with pytest.raises(sdk.BadRequestError) as error:
        ask(client, served, extra_body={"compute": {"operating_pint": "fast"}})
    assert "operating_pint" in error.value.message


def test_points_and_exits_are_listed(client: OpenAI, served: TestServer) -> None:
    with served.http() as http:
        listed = http.get("/v1/operating_points").raise_for_status().json()
        found = http.get("/v1/exits").raise_for_status().json()
        assert http.get("/v1/exits", headers={"Authorization": "Bearer no"}).status_code == 401
    names = [each["id"] for each in listed["data"]]
    assert names == ["exact", "balanced", "fast", "draft", "sketch"]
    for name in names:
        assert ask(client, served, extra_body={"compute": {"operating_point": name}})
    (replica,) = found["replicas"]
    assert replica["measures"]["softmax_gap@1.25"]["rows"]["agrees"] > 0


@pytest.mark.parametrize("aware", [True, False])
def test_load_is_told(client: OpenAI, served: TestServer, aware: bool) -> None:
    """One request runs at a time here, so that several are pressure."""
    compute = {"operating_point": "draft", "load_aware": aware}
    before = served.metrics().get("fathom_load_shifted_tokens_total", 0)

    def one(_: int) -> int:
        return int(ask(client, served, extra_body={"compute": compute})["load_shifted"])

    with ThreadPoolExecutor(6) as pool:
        shifted = list(pool.map(one, range(6)))
    after = served.metrics()
    assert after["fathom_load_shifted_tokens_total"] - before == sum(shifted)
    assert (sum(shifted) > 0) == aware
    assert all(0 <= count <= 24 for count in shifted)
    assert after["fathom_load_level"] <= 3


def test_the_terminal_shows_the_same(served: TestServer, fathom: Any) -> None:
    result = fathom("exits", "show", "--url", served.url, FATHOM_API_KEY=KEYS[0], COLUMNS="200")
    assert result.returncode == 0, result.stderr
    assert "All replicas together" in result.stdout
    assert "softmax_gap@1.25" in result.stdout.replace("\n", "")
