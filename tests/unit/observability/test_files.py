"""The files of deployments/observability name what a server really exposes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from fathom.api.app import create_app
from fathom.api.convert import Defaults
from fathom.api.local import LocalBackend
from fathom.api.service import Service
from fathom.config import EngineConfig
from fathom.engine.async_engine import AsyncEngine
from fathom.engine.build import build_engine
from fathom.exits.shadow_watch import ShadowWatch
from fathom.models.tokenizer import load_tokenizer
from fathom.types import AcceptMode, ComputePolicy, PolicyName
from tests.points import points_of
from tests.shadows import completion, expected_of
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]

FOLDER = Path(__file__).parents[3] / "deployments" / "observability"
ADAPTIVE = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.ADAPTIVE)
COMPUTES: tuple[dict[str, Any], ...] = (
    {"mode": "free", "policy": "always"},
    {"mode": "free", "policy": "budget", "budget": 0.9},
    {"operating_point": "balanced"},  # policy risk
)
_SERIES = re.compile(r"\b(fathom_\w+|up)\b(?:\{([^}]*)\})?")
_OVER_TIME = re.compile(r"\b(?:rate|increase)\((fathom_\w+)")
_LABEL = re.compile(r"(\w+)\s*(?:=~|!=|!~|=)")
_BY = re.compile(r"by \(([^)]*)\)")


@pytest.fixture(scope="module")
def exposed(tiny_model: Path) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Types and labels of all samples of a server that has done all kinds of work."""
    inner = build_engine(
        EngineConfig(
            model=str(tiny_model), dtype="float32", threads=1, kv_cache_bytes=4 << 20,
            exit_layer=2, adapter="none",
        )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(400):  # a random model's confidences have no mixture
        agrees = bool(rng.random() < 0.7)
        confidence = float(rng.beta(9, 1.5) if agrees else rng.beta(1.5, 4))
        inner.policies.observe(ADAPTIVE, confidence, agrees)
        inner.policies.threshold_for(ADAPTIVE, 0, 1)
    engine = AsyncEngine(inner)
    service = Service(
        backend=LocalBackend(engine, interval_s=0.0),
        tokenizer=load_tokenizer(tiny_model),
        model_name="tiny",
        defaults=Defaults(compute=ComputePolicy(), timeout_s=60, points=points_of(engine.info)),
    )
    watch = ShadowWatch(0.05)
    watch.expect({"p": expected_of(rng, loss=0.05, count=100)})
    watch.take(completion(rng) for _ in range(3))

    async def state() -> dict[str, Any]:
        return {"points": watch.points()}

    service.shadow = state
    app = create_app(service, key_digests=[], max_body_bytes=10_000)
    with TestClient(app, client=("127.0.0.1", 1)) as client:
        for compute in COMPUTES:
            body = {"model": "tiny", "prompt": "abc", "max_tokens": 90, "ignore_eos": True,
                    "compute": compute}  # fmt: skip
            assert client.post("/v1/completions", json=body).status_code == 200
        text = client.get("/metrics").text
    kinds, labels = {"up": "gauge"}, defaultdict(set, {"up": {"job", "instance"}})
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            kinds[sample.name] = family.type
            labels[sample.name] |= {*sample.labels, "job", "instance"}
    return kinds, labels


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "grafana.json").read_text())
    return found


def expressions() -> list[str]:
    """Every PromQL expression of the files, Grafana's variables filled in."""
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text())
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    for panel in dashboard()["panels"]:
        found += [target["expr"] for target in panel.get("targets", ())]
    return [each.replace("$__rate_interval", "5m").replace("$model", ".*") for each in found]


def test_every_metric_is_exposed_and_every_label_is_its(
    exposed: tuple[dict[str, str], dict[str, set[str]]],
) -> None:
    kinds, labels = exposed
    assert len(expressions()) > 40
    for expression in expressions():
        used = _SERIES.findall(expression)
        assert used, expression
        for name, selectors in used:
            assert name in kinds, f"{name} in {expression!r} is no metric of the server"
            for label in _LABEL.findall(selectors):
                assert label in labels[name], (label, expression)
        for group in _BY.findall(expression):
            wanted = {label.strip() for label in group.split(",")}
            assert wanted <= set.union(*(labels[name] for name, _ in used)), expression


def test_counters_are_read_as_rates_and_gauges_are_not(
    exposed: tuple[dict[str, str], dict[str, set[str]]],
) -> None:
    kinds, _ = exposed
    for expression in expressions():
        over_time = _OVER_TIME.findall(expression)
        for name in over_time:
            assert kinds[name] in ("counter", "histogram"), expression
        for name, _ in _SERIES.findall(expression):
            if kinds[name] in ("counter", "histogram"):
                assert name in over_time, expression


def test_legends_and_texts_name_labels_that_are_there() -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            kept = {part.strip() for g in _BY.findall(target["expr"]) for part in g.split(",")}
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named <= (kept or {"replica"}), target
    for rule in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]:
        kept = {part.strip() for g in _BY.findall(rule["expr"]) for part in g.split(",")}
        kept |= {"model_name", "instance"} if not kept else set()
        named = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert named <= kept, rule


def test_every_expression_is_promql() -> None:
    for expression in expressions():
        promql_parser.parse(expression)  # raises ValueError
    with pytest.raises(ValueError, match="unclosed left paren"):
        promql_parser.parse("sum(rate(fathom_x[5m])")


def test_the_dashboard_is_whole() -> None:
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own
        if panel["type"] == "row":
            continue
        assert {"legend", "tooltip"} <= set(panel["options"]) or panel["type"] == "stat"
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for own in (panel, *panel["targets"]):
            assert own["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, own
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"}
    assert used == variables == {"datasource", "model"}


def test_the_key_is_in_a_file_of_its_own() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert set(job["authorization"]) == {"credentials_file"}
    assert [(FOLDER / name).exists() for name in config["rule_files"]] == [True]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Prometheus's promtool")
def test_prometheus_takes_them(tmp_path: Path) -> None:
    rules = {"groups": [{"name": "all", "rules": [
        {"record": f"r{number}", "expr": each} for number, each in enumerate(expressions())
    ]}]}  # fmt: skip
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    for command in (
        ["check", "config", "--syntax-only", str(FOLDER / "prometheus.yml")],
        ["check", "rules", str(FOLDER / "alerts.yml")],
        ["check", "rules", str(tmp_path / "rules.yml")],
        ["test", "rules", str(Path(__file__).with_name("alerts.test.yml"))],
    ):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
