"""``fathom promote`` and ``fathom rollback``: a real MLflow, and a real server's routes."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import uvicorn

from fathom.api.app import create_app
from fathom.api.auth import digest
from fathom.api.convert import Defaults
from fathom.api.errors import other_model
from fathom.api.local import LocalBackend
from fathom.api.promotion import Promotion
from fathom.api.service import Service
from fathom.cli import main
from fathom.config import ConfigError, EngineConfig
from fathom.engine.async_engine import AsyncEngine
from fathom.models.tokenizer import load_tokenizer
from fathom.tuning.operating_points import OperatingPoints, from_dict
from fathom.types import ComputePolicy
from tests.points import points_of
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]

KEY, OPERATOR = "promote-key", "operator-key"


class OneProcess:
    """A takeover of a server that is one process, without a Serve that would tell others."""

    def __init__(self, service: Service, engine: AsyncEngine) -> None:
        self._service = service
        self._engine = engine

    async def promote(self, promotion: Promotion) -> None:
        try:
            promotion.points.check(self._engine.info)
        except ConfigError as error:
            raise other_model(str(error)) from error
        self._service.take(self._service.promoted.promote(promotion))

    async def rollback(self) -> None:
        self._service.take(self._service.promoted.rolled_back())


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> AsyncEngine:
    return AsyncEngine.from_config(
        EngineConfig(
            model=str(tiny_model), dtype="float32", threads=1, kv_cache_bytes=4 << 20,
            exit_layer=2, adapter="none",
        )
    )  # fmt: skip


@pytest.fixture
def url(request: pytest.FixtureRequest, engine: AsyncEngine, tiny_model: Path) -> Iterator[str]:
    """A server with an API key on loopback; with an operator's too where a test asks for it."""
    operators = [digest(key) for key in getattr(request, "param", ())]
    service = Service(
        backend=LocalBackend(engine, interval_s=0.0),
        tokenizer=load_tokenizer(tiny_model),
        model_name="tiny",
        defaults=Defaults(compute=ComputePolicy(), timeout_s=60),
    )
    app = create_app(
        service, key_digests=[digest(KEY), *operators], operator_digests=operators,
        max_body_bytes=8 << 20, takeover=OneProcess(service, engine),
    )  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose tables are made, which takes seconds."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


def study(name: str, points: OperatingPoints, empty: Path) -> None:
    """A work folder with points and a store, and no run yet."""
    folder = Path(f"tune-{name}")
    folder.mkdir()
    shutil.copy(empty, folder / "mlflow.db")
    (folder / "study.json").write_text(json.dumps({"name": name}))
    points.save(folder / "points.yaml")


@pytest.fixture
def points(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OperatingPoints:
    """Of the model that is served; we are in an empty folder, with its key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FATHOM_API_KEY", KEY)
    body = points_of(engine.info).as_dict()
    figures = {"draft": (0.992, 1.3), "sketch": (0.95, 1.6)}
    for name, (agreement, speedup) in figures.items():
        body["points"][name]["measured"] |= {
            "agreement": agreement, "predicted_speedup": speedup
        }  # fmt: skip
    return from_dict(body, "made-up")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    return " ".join((found.out + found.err).split())


def test_a_server_takes_over_what_is_promoted(
    url: str, points: OperatingPoints, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study("small", points, empty)
    dry = ["promote", "small", "--server", url, "--dry-run", "--json", "dry.json"]
    assert main(dry) == 0
    assert "would promote draft of study small (agreement 99.20%" in said(capsys)
    assert not Path("tune-small/mlflow_run_id").exists()
    assert json.loads(Path("dry.json").read_text())["dry_run"] is True

    assert main(["promote", "small", "--server", url, "--json", "out.json"]) == 0
    words = said(capsys)
    assert "production: models:/fathom-" in words
    assert f"{url} serves it: requests that name no compute get draft" in words
    report = json.loads(Path("out.json").read_text())
    assert (report["point"], report["version"], report["changed"]) == ("draft", 1, True)
    assert report["aliases"] == {"production": 1}
    assert report["serving"]["default"] == "draft"
    assert report["serving"]["source"] == report["uri"]
    assert report["serving"]["digest"] == points.digest

    loose = ["promote", "small", "--max-quality-loss", "0.05", "--json", "out.json"]
    loose += ["--server", url]
    assert main(loose) == 0
    report = json.loads(Path("out.json").read_text())
    assert (report["point"], report["aliases"]) == ("sketch", {"production": 2, "previous": 1})
    assert main(loose) == 0
    assert json.loads(Path("out.json").read_text())["changed"] is False

    for default, aliases in (
        ("draft", {"production": 1, "previous": 2}),
        ("sketch", {"production": 2, "previous": 1}),
    ):
        assert main(["rollback", "small", "--server", url, "--json", "back.json"]) == 0
        report = json.loads(Path("back.json").read_text())
        assert (report["serving"]["default"], report["aliases"]) == (default, aliases)
        assert report["serving"]["source"] == report["uri"]


@pytest.mark.parametrize("url", [[OPERATOR]], indirect=True)
def test_a_server_with_operators_takes_their_keys_alone(
    url: str,
    points: OperatingPoints,
    empty: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study("small", points, empty)
    promote = ["promote", "small", "--point", "draft", "--server", url]
    assert main(promote) == 1
    words = said(capsys)
    assert "answers 403: This API key may not change operating points" in words
    assert "one of FATHOM_OPERATOR_KEY where the server was started" in words
    monkeypatch.setenv("FATHOM_OPERATOR_KEY", f"{OPERATOR}, another")
    assert main(promote) == 0
    assert main(["rollback", "small", "--server", url]) == 0
    assert main([*promote, "--api-key-env", "FATHOM_API_KEY"]) == 1


def out_of_order(*_: object, **__: object) -> None:
    raise OSError("out of order")


def test_the_first_promotion_rolls_back_to_what_the_server_had(
    url: str,
    points: OperatingPoints,
    empty: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study("small", points, empty)
    assert main(["rollback", "small", "--server", url]) == 1
    assert "nothing to roll back to" in said(capsys)
    assert main(["promote", "small", "--server", url]) == 0
    assert main(["rollback", "small", "--server", url, "--json", "back.json"]) == 0
    report = json.loads(Path("back.json").read_text())
    assert (report["version"], report["aliases"]) == (None, {"previous": 1})
    assert (report["serving"]["default"], report["serving"]["source"]) == (None, None)
    # Cut off between server and registry, it can be done again: the server goes back once.
    assert main(["promote", "small", "--server", url]) == 0
    with monkeypatch.context() as broken:
        broken.setattr(mlflow.MlflowClient, "delete_registered_model_alias", out_of_order)
        assert main(["rollback", "small", "--server", url]) == 1
    assert "has taken the change over, but its aliases could not all be moved" in said(capsys)
    assert main(["rollback", "small", "--server", url, "--json", "back.json"]) == 0
    report = json.loads(Path("back.json").read_text())
    assert (report["serving"]["default"], report["aliases"]) == (None, {"previous": 1})
    # A second study has a registry of its own, and the server knows what it had.
    study("other", points, empty)
    assert main(["promote", "small", "--server", url]) == 0
    assert main(["promote", "other", "--point", "sketch", "--server", url]) == 0
    assert main(["rollback", "other", "--server", url, "--json", "back.json"]) == 0
    assert json.loads(Path("back.json").read_text())["serving"]["default"] == "draft"


@pytest.mark.parametrize("trouble", ["away", "key", "model"])
def test_a_server_that_does_not_take_it_leaves_the_aliases(
    trouble: str,
    url: str,
    points: OperatingPoints,
    empty: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study("small", points if trouble != "model" else points_of(), empty)
    promote = ["promote", "small", "--point", "draft"]
    assert main(promote) == 0
    words = {
        "away": "no server answers at http://127.0.0.1:9",
        "key": "answers 401; OTHER_KEY must hold its key",
        "model": "answers 409: models:/fathom-tiny/2: these operating points were measured on "
        "another model: weights_digest w",
    }[trouble]
    options = ["--server", url]
    if trouble == "away":
        options = ["--server", "http://127.0.0.1:9"]
    if trouble == "key":
        monkeypatch.setenv("OTHER_KEY", "wrong")
        options += ["--api-key-env", "OTHER_KEY"]
    capsys.readouterr()
    assert main(["promote", "small", "--point", "sketch", *options]) == 1
    found = said(capsys)
    assert words in found
    assert "are as they were (production is version 1): put it right and run the command" in found
    # Then it can be done.
    assert main(["promote", "small", "--point", "sketch", "--json", "out.json"]) == 0
    report = json.loads(Path("out.json").read_text())
    assert (report["version"], report["aliases"]) == (2, {"production": 2, "previous": 1})


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["promote", "nope"], 2, "no study 'nope': looked for it in the folders nope and"),
        (["promote", "small", "--max-quality-loss", "0.001"], 2, "the best there is, draft, loses"),
        (["promote", "small", "--max-quality-loss", "2"], 2, "must be a share in [0, 1], got 2"),
        (["promote", "small", "--point", "x"], 2, "--point must be one of exact, balanced"),
        (["promote", "small", "--point", "draft", "--max-quality-loss", "0"], 2, "not both"),
        (["promote", "small", "--server", "nowhere"], 2, "the server's URL must be as http://"),
        (["promote", "small", "--json", "no/where.json"], 2, "no such folder"),
        (["rollback", "nope"], 2, "no study 'nope'"),
        (["rollback", "small", "--dry-run"], 1, "nothing to roll back to"),
    ],
)
def test_mistakes_are_told(
    options: list[str],
    code: int,
    words: str,
    points: OperatingPoints,
    empty: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study("small", points, empty)
    assert main(options) == code
    assert words in said(capsys)
    assert not Path("tune-small/mlflow_run_id").exists()
