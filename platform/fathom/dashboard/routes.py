"""``/dashboard``: the pages, the login, and what they ask that no other route tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qs

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from fathom import __version__
from fathom.api import sessions
from fathom.api.auth import ASSETS, DASHBOARD, LOGIN, digest, is_allowed
from fathom.api.errors import ApiError
from fathom.dashboard.assets import HEADERS, asset, send
from fathom.dashboard.studies import Studies
from fathom.settings import ConfigError

LOGOUT = "/dashboard/logout"
_REFUSED = b'<p class="failure" role="alert">That is none of this server\'s API keys.</p>'
_NO_STUDIES = (
    "Studies come from MLflow, and no tracking server is set: start with --mlflow URI "
    "(`fathom serve --mlflow URI`, or `fathom dashboard --mlflow URI`)."
)

Result = TypeVar("Result")


class Control(Protocol):
    """Changes what a server serves by default."""

    async def promote(self, uri: str, run_id: str, point: str) -> None:
        """Register a study's points and have the server take them over.

        Args:
            uri: of the tracking server. run_id: of the study. point: the new default.

        Raises:
            ApiError, InvalidRequest, ConfigError, BackendUnavailable: nothing has changed then.
        """
        ...

    async def rollback(self, uri: str) -> None:
        """Go back to what was before the last promotion; see ``promote``."""
        ...


class PromotePoint(BaseModel):
    """Body of ``POST /dashboard/data/studies/RUN/promote``."""

    point: str


def add_dashboard_routes(
    app: FastAPI,
    *,
    digests: Sequence[bytes],
    mlflow: str = "",
    links: Mapping[str, str] | None = None,
    control: Control | None = None,
) -> None:
    """Add the dashboard to an application behind ``KeyMiddleware``.

    Args:
        digests: of the API keys, as the middleware has them; without any there is no login.
        mlflow: tracking server that studies are read from; empty for none.
        links: other pages by their names, as the Ray dashboard.
        control: how points are promoted, if they can be.
    """
    studies = Studies(mlflow) if mlflow else None
    _add_pages(app)
    _add_login(app, tuple(digests))
    _add_data(app, studies, dict(links or {}), can_log_out=bool(digests))
    if studies is not None and control is not None:
        _add_control(app, studies, control)


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
    def login_page(request: Request, session: str = "") -> Response:
        """The form; a link that holds a session of its own needs none (``dashboard.proxy``)."""
        owner = sessions.owner_of_session(session, digests)
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


def _add_data(
    app: FastAPI, studies: Studies | None, links: dict[str, str], *, can_log_out: bool
) -> None:
    if studies is not None and studies.page:
        links = {"MLflow": studies.page, **links}

    @app.get(f"{DASHBOARD}/data/site", response_model=None, include_in_schema=False)
    async def site() -> dict[str, Any]:
        return {"version": __version__, "links": links, "can_log_out": can_log_out}

    @app.get(f"{DASHBOARD}/data/studies", response_model=None, include_in_schema=False)
    async def listed() -> dict[str, Any]:
        if studies is None:
            return {"studies": [], "why": _NO_STUDIES}
        found = await _ask(studies, studies.listed)
        return {"studies": found, "has_ui": bool(studies.page)}

    @app.get(f"{DASHBOARD}/data/studies/{{run_id}}", response_model=None, include_in_schema=False)
    async def study(run_id: str) -> dict[str, Any]:
        own = _needed(studies)
        return await _ask(own, lambda: own.study(_run_id(run_id)))


def _add_control(app: FastAPI, studies: Studies, control: Control) -> None:
    where = f"{DASHBOARD}/data"

    @app.post(f"{where}/studies/{{run_id}}/promote", response_model=None, include_in_schema=False)
    async def promote(run_id: str, body: PromotePoint) -> dict[str, Any]:
        await control.promote(studies.uri, _run_id(run_id), body.point)
        return {"promoted": body.point}

    @app.post(f"{where}/rollback", response_model=None, include_in_schema=False)
    async def rollback() -> dict[str, Any]:
        await control.rollback(studies.uri)
        return {"rolled_back": True}


def _check_own_page(request: Request) -> None:
    """Refuse to log anybody in or out on behalf of another site."""
    if not sessions.is_own_page(request.scope):
        raise ApiError(403, "This form can only be sent from the dashboard's own pages.")


def _needed(studies: Studies | None) -> Studies:
    if studies is None:
        raise ApiError(404, _NO_STUDIES)
    return studies


def _run_id(text: str) -> str:
    # MLflow takes it into a filter and a path.
    if not (text.isascii() and text.isalnum() and len(text) <= 64):
        raise ApiError(404, f"There is no run {text!r}.")
    return text


async def _ask(studies: Studies, work: Callable[[], Result]) -> Result:
    """What the tracking server says, without stopping the loop.

    Raises:
        ApiError: with its words, if it does not answer or refuses.
    """
    try:
        return await asyncio.to_thread(work)
    except ConfigError as error:
        raise ApiError(503, str(error), kind="server_error") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("mlflow", "sqlalchemy"):
            raise
        words = " ".join(str(error).split())[:300]
        raise ApiError(
            502, f"The tracking server {studies.uri} says: {words}", kind="server_error"
        ) from error
