"""``fathom promote`` and ``fathom rollback``: which measured point production runs at."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.commands.asking import (
    DEFAULT_URL,
    KEY_VARIABLE,
    OPERATOR_VARIABLE,
    ask,
    check_url,
    first_key,
)
from fathom.commands.options import UsageError, add_command
from fathom.commands.reports import check_output, write_json

if TYPE_CHECKING:
    from fathom.tuning.registry import Registry

ROUTE = "/v1/operating_points"

_PROMOTE = """\
  fathom promote small --server http://127.0.0.1:8000     the fastest point that loses at most 1 %
  fathom promote small --max-quality-loss 0.05 --dry-run  which would be taken?
  fathom promote tune-small --point front-3               another, by its name
  fathom promote small --mlflow http://host:5000          from, and into, a tracking server
  fathom serve --operating-points models:/NAME@production --mlflow URI    start with what serves

STUDY is the name of a study of `fathom tune`, its work folder, or the id of its MLflow run.
A running server takes the point over without a restart; requests under way end as they began.
Where a server has operators' keys (FATHOM_OPERATOR_KEY), it takes one of those and no other.
"""

_ROLLBACK = """\
  fathom rollback small --server http://127.0.0.1:8000    back to what served before; twice undoes
  fathom rollback fathom-SmolLM2-135M-Instruct-default --mlflow http://host:5000 --server URL

STUDY is a study as of `fathom promote`, or with --mlflow the name of a registered model.
"""


def add_parser(commands: Any) -> None:
    """Declare both commands and their options."""
    promote = add_command(
        commands,
        "promote",
        run_promote,
        about="have production run at a point of a study",
        examples=_PROMOTE,
    )
    promote.add_argument("study", metavar="STUDY", help="a study of `fathom tune`")
    promote.add_argument(
        "--max-quality-loss",
        type=float,
        metavar="SHARE",
        help="most tokens that may differ from the full model's (default: 0.01)",
    )
    promote.add_argument("--point", metavar="NAME", help="this point, whatever it loses")
    rollback = add_command(
        commands,
        "rollback",
        run_rollback,
        about="return to the point before the last promotion",
        examples=_ROLLBACK,
    )
    rollback.add_argument("study", metavar="STUDY", help="a study, or a registered model's name")
    for parser in (promote, rollback):
        parser.add_argument(
            "--mlflow", default="", metavar="URI",
            help="tracking server (default: the SQLite in the study's work folder)",
        )  # fmt: skip
        parser.add_argument(
            "--server", metavar="URL", help=f"have this server take it over, as {DEFAULT_URL}"
        )
        parser.add_argument(
            "--api-key-env", metavar="VARIABLE",
            help="environment variable with the server's API key (default: "
            f"{OPERATOR_VARIABLE} if that is set, else {KEY_VARIABLE})",
        )  # fmt: skip
        parser.add_argument("--dry-run", action="store_true", help="say what would be done")
        parser.add_argument("--json", type=Path, metavar="OUT", help="write what was done here")


def run_promote(args: argparse.Namespace) -> int:
    """Register the points of a study, have the server take them over, and move the aliases."""
    loss = 0.01 if args.max_quality_loss is None else args.max_quality_loss
    if args.point is not None and args.max_quality_loss is not None:
        raise UsageError("give --point or --max-quality-loss, not both.")
    if not 0 <= loss <= 1:
        raise UsageError(f"--max-quality-loss must be a share in [0, 1], got {loss:g}.")
    _check(args)
    from fathom.tuning.registry import PRODUCTION, Registry, model_name
    from fathom.tuning.studies import find_study, pick

    made = find_study(args.study, args.mlflow)
    points = made.points()
    point = args.point or pick(points, loss)
    if point not in points.points:
        raise UsageError(f"--point must be one of {', '.join(points.points)}, got {point!r}.")
    report: dict[str, Any] = {
        "study": made.name,
        "model": model_name(points.identity),
        "point": point,
        "measured": dict(points.points[point].measured),
        "mlflow": made.uri,
        "server": args.server,
        "dry_run": args.dry_run,
    }
    if args.dry_run:
        where = f", and have {args.server} take it over" if args.server else ""
        return _done(args, report, f"would promote {_described(report)}{where}")
    made = made.with_run()
    registry = Registry(made.uri)
    version = registry.register(made.run_id, points, point, made.name)
    if args.server:
        body = {"points": points.as_dict(), "default": point, "source": version.uri}
        report["serving"] = _take(args, registry, version.name, ROUTE, body)
    changed = _move(args, lambda: registry.set_production(version))
    report |= {
        "run_id": version.run_id,
        "version": version.number,
        "uri": version.uri,
        "changed": changed,
        "aliases": registry.aliases(version.name),
    }
    again = "" if changed else " (it was already)"
    words = f"{PRODUCTION}: {version.uri}, {_described(report)}{again}"
    return _done(args, report, words + _served(report))


def run_rollback(args: argparse.Namespace) -> int:
    """Have the server go back, and swap the aliases."""
    _check(args)
    from fathom.tuning.registry import PRODUCTION, Registry, model_name
    from fathom.tuning.studies import find_study

    registry, name = None, args.study
    if args.mlflow:
        registry = Registry(args.mlflow)
    if registry is None or not registry.aliases(name):
        made = find_study(args.study, args.mlflow)
        if registry is None:
            registry = Registry(made.uri)
        name = model_name(made.points().identity)
    target = registry.before(name)
    report: dict[str, Any] = {
        "model": name,
        "mlflow": registry.uri,
        "version": target and target.number,
        "uri": target and target.uri,
        "point": target and target.point,
        "server": args.server,
        "dry_run": args.dry_run,
    }
    to = (
        f"{target.uri}, {target.point} of study {target.study}"
        if target
        else "what servers were started with"
    )
    if args.dry_run:
        return _done(args, report, f"would return to {to}")
    if args.server:
        if target is None:
            report["serving"] = _take_back(args, registry, name)
        else:
            points, _ = registry.load(target.uri)
            body = {"points": points.as_dict(), "default": target.point, "source": target.uri}
            report["serving"] = _take(args, registry, name, ROUTE, body)
    _move(args, lambda: registry.roll_back(name))
    report["aliases"] = registry.aliases(name)
    return _done(args, report, f"{PRODUCTION}: back to {to}{_served(report)}")


def _check(args: argparse.Namespace) -> None:
    """Check what can be known before anything is loaded."""
    if importlib.util.find_spec("mlflow") is None:
        raise UsageError(
            "the registry is MLflow's, which is not installed: "
            "python -m pip install 'fathom-serve[train]'."
        )
    check_output(args.json)
    if args.server is not None:
        check_url(args.server)


def _take(
    args: argparse.Namespace,
    registry: Registry,
    name: str,
    route: str,
    body: Mapping[str, Any] | None,
    *,
    post: bool = True,
) -> dict[str, Any]:
    """Have the server change, or only say what it has.

    The aliases are moved after that, so that they never run ahead.

    Returns:
        what the server says it has now.

    Raises:
        RuntimeError: if it does not answer or refuses, with what that leaves.
    """
    try:
        named = args.api_key_env or (
            OPERATOR_VARIABLE if first_key(OPERATOR_VARIABLE) else KEY_VARIABLE
        )
        answer = ask(args.server, route, body, post=post, key_variable=named)
    except RuntimeError as error:
        aliases = registry.aliases(name)
        left = ", ".join(f"{a} is version {n}" for a, n in sorted(aliases.items()))
        raise RuntimeError(
            f"{error} The aliases of {name} are as they were ({left or 'there are none'}): put it "
            "right and run the command again."
        ) from error
    return {key: answer[key] for key in ("default", "source", "digest", "since")}


def _take_back(args: argparse.Namespace, registry: Registry, name: str) -> dict[str, Any]:
    """Have the server return to what it had before, which it knows and the registry does not.

    One that does not run at what is promoted has done so already: then this command was cut off,
    and doing it twice would lead back.
    """
    from fathom.tuning.registry import PRODUCTION

    now = registry.version(name, registry.aliases(name)[PRODUCTION])
    serving = _take(args, registry, name, ROUTE, None, post=False)
    if (serving["digest"], serving["default"]) != (now.digest, now.point):
        return serving
    return _take(args, registry, name, f"{ROUTE}/rollback", None)


def _move(args: argparse.Namespace, move: Callable[[], bool | None]) -> bool | None:
    """Move the aliases.

    Raises:
        RuntimeError: if they cannot be, with what that leaves.
    """
    from fathom.tuning.registry import RegistryError

    try:
        return move()
    except RegistryError as error:
        if not args.server:
            raise
        raise RuntimeError(
            f"{args.server} has taken the change over, but its aliases could not all be moved: "
            f"{error} Run the command again."
        ) from error


def _described(report: Mapping[str, Any]) -> str:
    measured = report["measured"]
    figures = [
        words.format(measured[name])
        for name, words in (
            ("agreement", "agreement {:.2%}"), ("predicted_speedup", "predicted speed-up {:.2f}"),
        )
        if name in measured
    ]  # fmt: skip
    known = f" ({', '.join(figures)})" if figures else ""
    return f"{report['point']} of study {report['study']}{known}"


def _served(report: Mapping[str, Any]) -> str:
    if "serving" not in report:
        return ""
    return f"\n{report['server']} serves it: requests that name no compute get " + (
        report["serving"]["default"] or "what it was started with"
    )


def _done(args: argparse.Namespace, report: Mapping[str, Any], words: str) -> int:
    if args.json is not None:
        write_json(args.json, report)
    print(words)
    return 0
