"""Studies and the registry of their points: a real MLflow on SQLite."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest

from fathom.settings import ConfigError
from fathom.training.tracking import Tracker
from fathom.tuning.operating_points import OperatingPoints, Point, load
from fathom.tuning.registry import (
    PREVIOUS,
    PRODUCTION,
    Registry,
    RegistryError,
    model_name,
)
from fathom.tuning.studies import NoPoint, NoStudy, describe_study, find_study, list_studies, pick
from tests.points import points_of


def front_of() -> OperatingPoints:
    """Points as a study makes them: named, measured, three of them in the way of each other."""
    made = points_of()
    measured = {
        "front-1": {"agreement": 1.0, "predicted_speedup": 1.2},
        "front-2": {"agreement": 0.99, "predicted_speedup": 1.4},
        "front-3": {"agreement": 0.97, "predicted_speedup": 1.6},
        "slow": {"agreement": 0.995, "predicted_speedup": 1.1},
    }
    points = {
        name: Point(
            dataclasses.replace(made.points["draft"].compute, operating_point=name), figures
        )
        for name, figures in measured.items()
    }
    points["unmeasured"] = made.points["draft"]
    return dataclasses.replace(made, points=points)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose tables are made, which takes seconds."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def folder(tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder of study ``small``, as ``fathom tune`` leaves it, below where we are."""
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "tune-small"
    made.mkdir()
    shutil.copy(empty, made / "mlflow.db")
    (made / "study.json").write_text(json.dumps({"name": "small", "trials": 2}))
    (made / "front.json").write_text(json.dumps({"front": [{"point": "front-1"}]}))
    front_of().save(made / "points.yaml")
    tags = {"fathom.version": "1", "fathom.model": "tiny"}
    with Tracker(
        made, name="small", params={"trials": 2}, uri="", experiment="fathom-tune", tags=tags
    ) as tracker:
        tracker.add_child("trial-00000", {"mode": "free"}, {"quality": 0.5})
        tracker.keep_file(made / "front.json")
        tracker.keep_file(made / "points.yaml")
        tracker.log(2, {"trials": 2, "hypervolume": 0.25})
    return made


def test_a_version_is_a_file_with_a_point(folder: Path) -> None:
    made = find_study("small")
    points = made.points()
    registry = Registry(made.uri)
    one = registry.register(made.run_id, points, "front-1", "small")
    assert (one.name, one.number, one.point) == ("fathom-tiny", 1, "front-1")
    assert registry.register(made.run_id, points, "front-1", "small") == one
    other = registry.register(made.run_id, points, "front-2", "small")
    assert [each.number for each in registry.versions("fathom-tiny")] == [2, 1]
    assert registry.aliases("fathom-tiny") == {}

    # Promoted twice is promoted once.
    assert registry.set_production(one)
    assert not registry.set_production(one)
    assert registry.aliases("fathom-tiny") == {PRODUCTION: 1}
    assert registry.set_production(other)
    assert registry.aliases("fathom-tiny") == {PRODUCTION: 2, PREVIOUS: 1}
    for uri, version in (
        ("models:/fathom-tiny@production", other),
        ("models:/fathom-tiny@previous", one),
        ("models:/fathom-tiny/1", one),
    ):
        found, known = registry.load(uri)
        assert known == version
        assert found.path == version.uri
        assert found.digest == points.digest == load(folder / "points.yaml").digest
    client = mlflow.MlflowClient(made.uri)
    tags = client.get_model_version("fathom-tiny", "2").tags
    assert tags["fathom.study"] == "small"
    assert tags["fathom.weights_digest"] == points.identity.weights_digest
    assert float(tags["fathom.agreement"]) == 0.99


def test_a_study_that_goes_on_changes_no_version(folder: Path) -> None:
    made = find_study("small")
    registry = Registry(made.uri)
    old = made.points()
    version = registry.register(made.run_id, old, "front-1", "small")
    more = dataclasses.replace(old, points={"front-1": old.points["front-2"]})
    more.save(folder / "points.yaml")
    new = registry.register(made.run_id, made.points(), "front-1", "small")
    assert new.number == version.number + 1
    assert registry.load(version.uri)[0].digest == old.digest
    assert registry.load(new.uri)[0].digest == more.digest
    # Whoever changes the file of a version is found out.
    (kept,) = (folder / "mlflow-artifacts").rglob(f"{old.digest[:16]}/points.yaml")
    more.save(kept)
    with pytest.raises(RegistryError, match="is not the one that was registered"):
        registry.load(version.uri)


def test_rolling_back_twice_leads_back(folder: Path) -> None:
    made = find_study("small")
    registry, points = Registry(made.uri), made.points()
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        registry.before("fathom-tiny")
    one = registry.register(made.run_id, points, "front-1", "small")
    two = registry.register(made.run_id, points, "front-2", "small")
    registry.set_production(one)
    # Before the first promotion there was what servers are started with.
    assert registry.before("fathom-tiny") is None
    registry.roll_back("fathom-tiny")
    assert registry.aliases("fathom-tiny") == {PREVIOUS: 1}
    assert registry.before("fathom-tiny") == one
    registry.roll_back("fathom-tiny")
    assert registry.aliases("fathom-tiny") == {PRODUCTION: 1}
    registry.set_production(two)
    registry.roll_back("fathom-tiny")
    assert registry.aliases("fathom-tiny") == {PRODUCTION: 1, PREVIOUS: 2}
    registry.roll_back("fathom-tiny")
    assert registry.aliases("fathom-tiny") == {PRODUCTION: 2, PREVIOUS: 1}


def test_an_interrupted_promotion_is_done_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before each call that writes, in turn: what is done again ends as if it never was."""
    made = find_study("small")
    points = made.points()
    first = Registry(made.uri)
    first.set_production(first.register(made.run_id, points, "front-1", "small"))
    writes = (
        "log_artifact", "create_model_version", "set_registered_model_alias",
    )  # fmt: skip
    client = mlflow.MlflowClient
    for method in writes:
        real = getattr(client, method)

        def cut_off(*args: object, **options: object) -> None:
            raise KeyboardInterrupt

        shutil.copy(folder / "mlflow.db", folder / "before.db")
        changed = dataclasses.replace(points, points={method: points.points["front-2"]})

        def promote(changed: OperatingPoints = changed, method: str = method) -> None:
            registry = Registry(made.uri)
            registry.set_production(registry.register(made.run_id, changed, method, "small"))

        before = first.aliases("fathom-tiny")
        monkeypatch.setattr(client, method, cut_off)
        with pytest.raises(KeyboardInterrupt):
            promote()
        monkeypatch.setattr(client, method, real)
        assert first.aliases("fathom-tiny") == before
        promote()
        latest, *rest = first.versions("fathom-tiny")
        assert latest.point == method
        assert method not in {each.point for each in rest}
        assert first.aliases("fathom-tiny") == {
            PRODUCTION: latest.number, PREVIOUS: before[PRODUCTION]
        }  # fmt: skip


def test_studies_are_found_by_all_their_names(folder: Path, tmp_path: Path) -> None:
    run_id = (folder / "mlflow_run_id").read_text()
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    for name, given in (
        ("small", ""), ("tune-small", ""), (str(folder), ""), (run_id, ""), (run_id, uri),
        ("small", uri),
    ):  # fmt: skip
        made = find_study(name, given)
        assert (made.name, made.run_id, made.uri) == ("small", run_id, uri)
    # From its store alone, as on another machine.
    (tmp_path / "elsewhere").mkdir()
    folder.rename(tmp_path / "elsewhere" / "moved")
    with pytest.raises(NoStudy, match=r"looked for it in the folders small and tune-small"):
        find_study("small")
    with pytest.raises(NoStudy, match=r"and in experiment fathom-tune at sqlite"):
        find_study("other", f"sqlite:///{tmp_path / 'elsewhere' / 'moved' / 'mlflow.db'}")
    with pytest.raises(RegistryError, match="there is no MLflow store at"):
        find_study("small", uri)


def test_a_study_without_mlflow_gets_a_run(folder: Path, empty: Path) -> None:
    (folder / "mlflow_run_id").unlink()
    shutil.copy(empty, folder / "mlflow.db")
    made = find_study("small").with_run()
    assert made.run_id == (folder / "mlflow_run_id").read_text()
    assert made.with_run() is made
    registry = Registry(made.uri)
    registry.set_production(registry.register(made.run_id, made.points(), "front-1", "small"))
    (listed,) = list_studies(made.uri)
    assert (listed["study"], listed["model"]) == ("small", "tiny")
    assert describe_study(made.uri, made.run_id)["promoted"][0]["aliases"] == ["production"]


def test_studies_are_listed_with_what_was_promoted(folder: Path) -> None:
    made = find_study("small")
    registry = Registry(made.uri)
    registry.set_production(registry.register(made.run_id, made.points(), "front-2", "small"))
    (listed,) = list_studies(made.uri)
    own = describe_study(made.uri, made.run_id)
    json.dumps(own)  # plain
    assert listed.items() <= own.items()
    assert (listed["study"], listed["status"], listed["trials"]) == ("small", "FINISHED", 2)
    assert listed["hypervolume"] == 0.25
    assert own["front"] == [{"point": "front-1"}]
    assert own["registered_model"] == "fathom-tiny"
    assert own["digest"] == made.points().digest
    assert own["promoted"] == [
        {
            "version": 1, "uri": "models:/fathom-tiny/1", "point": "front-2",
            "aliases": ["production"],
        }
    ]  # fmt: skip


def test_a_server_starts_with_what_was_promoted(folder: Path) -> None:
    from deployments.app import build

    made = find_study("small")
    registry = Registry(made.uri)
    registry.set_production(registry.register(made.run_id, made.points(), "front-2", "small"))
    name = "models:/fathom-tiny@production"
    for compute, point in (({}, "front-2"), ({"operating_point": "front-3"}, "front-3")):
        application = build(
            {"operating_points": name, "mlflow": made.uri, "engine": {"compute": compute}}
        )
        given: Any = application._bound_deployment.init_args
        _, config, _, _, points, _ = given
        assert config.engine.compute == made.points().resolve(point)
        assert points.path == "models:/fathom-tiny/1"
    with pytest.raises(ConfigError, match="say which by mlflow"):
        build({"operating_points": name})


def test_what_is_not_there_is_said(folder: Path) -> None:
    made = find_study("small")
    registry = Registry(made.uri)
    with pytest.raises(RegistryError, match="of fathom-tiny: none"):
        registry.load("models:/fathom-tiny@production")
    with pytest.raises(RegistryError, match="there is no such version"):
        registry.load("models:/fathom-tiny/7")
    with pytest.raises(RegistryError, match="must be models:/NAME@ALIAS"):
        registry.load("models:/fathom-tiny")
    with pytest.raises(RegistryError, match=r"run nowhere of study small is not at"):
        registry.register("nowhere", made.points(), "front-1", "small")
    (folder / "points.yaml").unlink()
    assert made.points().points  # the run has it still
    with pytest.raises(ConfigError, match=r"has no points\.yaml"):
        dataclasses.replace(made, run_id="").points()


@pytest.mark.parametrize(
    ("loss", "point"), [(0.0, "front-1"), (0.005, "front-1"), (0.01, "front-2"), (1.0, "front-3")]
)
def test_the_fastest_point_that_is_good_enough_is_picked(loss: float, point: str) -> None:
    assert pick(front_of(), loss) == point


def test_without_a_good_point_the_best_is_named() -> None:
    own = front_of()
    poor = dataclasses.replace(own, points={"front-3": own.points["front-3"]})
    with pytest.raises(NoPoint, match=r"the best there is, front-3, loses 0\.03 "):
        pick(poor, 0.01)
    with pytest.raises(NoPoint, match="no point has a measured agreement"):
        pick(points_of(), 0.01)


def test_names_of_registered_models() -> None:
    own = points_of().identity
    for model, adapter, name in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "default", "fathom-SmolLM2-135M-Instruct-default"),
        ("/models/some model:v1/", "", "fathom-some-model-v1"),
    ):
        assert model_name(dataclasses.replace(own, model=model, adapter=adapter)) == name
