"""``/dashboard``: the pages, the login, and what they ask that no other route tells."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from fathom import __version__
from fathom.api import sessions
from fathom.api.auth import ASSETS, DASHBOARD, LOGIN, digest, is_allowed, may_operate
from fathom.api.errors import ApiError
from fathom.dashboard import control
from fathom.dashboard.assets import HEADERS, asset, send
from fathom.dashboard.control import Server
from fathom.settings import ConfigError

LOGOUT = "/dashboard/logout"
SITE = "/dashboard/data/site"
STUDIES = "/dashboard/data/studies"
ROLLBACK = "/dashboard/data/rollback"
_REFUSED = b'<p class="failure" role="alert">That is none of this server\'s API keys.</p>'
_NO_STUDIES = (
    "Studies come from MLflow, and no tracking server is set: start with --mlflow URI "
    "(`fathom serve --mlflow URI`, or `fathom dashboard --mlflow URI`)."
)

Result = TypeVar("Result")


class PromotePoint(BaseModel):
    """Body of ``POST /dashboard/data/studies/RUN/promote``."""

    point: str


def add_dashboard_routes(
    app: FastAPI,
    *,
    digests: Sequence[bytes],
    operators: Sequence[bytes] = (),
    mlflow: str = "",
    links: Mapping[str, str] | None = None,
    server: Server | None = None,
) -> None:
    """Add the dashboard to an application behind ``KeyMiddleware``.

    Args:
        digests: of the API keys, as the middleware has them; without any there is no login.
        operators: digests of those that may promote; without any, all may.
        mlflow: tracking server that studies are read from; empty for none.
        links: other pages by their names, as the Ray dashboard.
        server: what points are promoted on, if they can be.
    """
    _add_pages(app)
    _add_login(app, tuple(digests))
    page = mlflow.rstrip("/") if urlsplit(mlflow).scheme in ("http", "https") else ""
    known = {**({"MLflow": page} if page else {}), **(links or {})}
    _add_site(app, known, tuple(operators), can_log_out=bool(digests))
    _add_studies(app, mlflow, page)
    if mlflow and server is not None:
        _add_control(app, mlflow, server)


def _add_pages(app: FastAPI) -> None:
    @app.get(DASHBOARD, include_in_schema=False)
    def page(request: Request) -> Response:
        return send(request, "index.html")

    @app.get(f"{DASHBOARD}/", include_in_schema=False)
    def slash() -> Response:
        return RedirectResponse("../dashboard", 308)

    @app.get(ASSETS + "{name}", include_in_schema=False)
    def file(name: str, request: Request) -> Response:
        try:
            return send(request, name)
        except FileNotFoundError:
            raise HTTPException(404, f"The dashboard has no file {name!r}.") from None


def _add_login(app: FastAPI, digests: tuple[bytes, ...]) -> None:
    @app.get(LOGIN, include_in_schema=False)
    def login_page(request: Request, link: str = "") -> Response:
        """The form, but for who comes by a link that ``fathom dashboard`` has printed."""
        owner = sessions.owner_of_session(link, digests, kind=sessions.LINK)
        if digests and owner is None:
            return send(request, "login.html")
        answer = RedirectResponse("../dashboard", 303)
        if owner is not None:
            sessions.begin(answer, request.scope, sessions.issue(owner))
        return answer

    @app.post(LOGIN, include_in_schema=False)
    async def login(request: Request) -> Response:
        _check_own_page(request)
        body = parse_qs((await request.body()).decode(errors="replace"))
        key = body.get("key", [""])[0].strip()
        if not is_allowed(key, digests):
            found = asset("login.html")
            text = found.body.replace(b"<!--refused-->", _REFUSED)
            headers = {**HEADERS, "Cache-Control": "no-store"}
            return Response(text, 403, headers, found.media_type)
        answer = RedirectResponse("../dashboard", 303)
        sessions.begin(answer, request.scope, sessions.issue(digest(key)))
        return answer

    @app.post(LOGOUT, include_in_schema=False)
    async def logout(request: Request) -> Response:
        _check_own_page(request)
        answer = RedirectResponse("login", 303)
        sessions.end(answer, request.scope)
        return answer


def _add_site(
    app: FastAPI, links: dict[str, str], operators: tuple[bytes, ...], *, can_log_out: bool
) -> None:
    @app.get(SITE, response_model=None, include_in_schema=False)
    async def site(request: Request) -> dict[str, Any]:
        return {
            "version": __version__,
            "links": links,
            "can_log_out": can_log_out,
            "can_promote": may_operate(request.scope, operators),
        }


def _add_studies(app: FastAPI, mlflow: str, page: str) -> None:
    """Args: page: address of MLflow's own pages; empty for a store without them."""

    def linked(study: dict[str, Any]) -> dict[str, Any]:
        where = f"experiments/{study['experiment_id']}/runs/{study['run_id']}"
        return {**study, "url": f"{page}/#/{where}" if page else None}

    @app.get(STUDIES, response_model=None, include_in_schema=False)
    async def listed() -> dict[str, Any]:
        if not mlflow:
            return {"studies": [], "why": _NO_STUDIES}
        from fathom.tuning.studies import list_studies

        found = await _asked(asyncio.to_thread(list_studies, mlflow))
        return {"studies": [linked(each) for each in found]}

    @app.get(STUDIES + "/{run_id}", response_model=None, include_in_schema=False)
    async def study(run_id: str) -> dict[str, Any]:
        if not mlflow:
            raise ApiError(404, _NO_STUDIES)
        from fathom.tuning.studies import describe_study

        return linked(await _asked(asyncio.to_thread(describe_study, mlflow, run_id)))


def _add_control(app: FastAPI, mlflow: str, server: Server) -> None:
    @app.post(STUDIES + "/{run_id}/promote", response_model=None, include_in_schema=False)
    async def promote(run_id: str, body: PromotePoint) -> dict[str, Any]:
        await _asked(control.promote(server, mlflow, run_id, body.point))
        return {"promoted": body.point}

    @app.post(ROLLBACK, response_model=None, include_in_schema=False)
    async def rollback() -> dict[str, Any]:
        await _asked(control.roll_back(server, mlflow))
        return {"rolled_back": True}


def _check_own_page(request: Request) -> None:
    """Refuse to log anybody in or out on behalf of another site."""
    if not sessions.is_own_page(request.scope):
        raise ApiError(403, "This form can only be sent from the dashboard's own pages.")


async def _asked(work: Awaitable[Result]) -> Result:
    """What a tracking server says.

    Raises:
        ApiError: with its words, if it does not answer or has not what was asked for.
    """
    from fathom.tuning.registry import RegistryError

    try:
        return await work
    except ModuleNotFoundError as error:
        raise ApiError(
            503,
            f"studies need {error.name}, which is not installed where the dashboard is served: "
            "python -m pip install 'fathom-serve[train]'.",
            kind="server_error",
        ) from error
    except RegistryError as error:
        raise ApiError(502, " ".join(str(error).split()), kind="server_error") from error
    except ConfigError as error:
        raise ApiError(404, str(error)) from error
