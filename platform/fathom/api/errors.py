"""Every way in which a request can fail, in OpenAI's form: ``{"error": {message, type, ...}}``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fathom.api.backend import BackendUnavailable, QueueFull
from fathom.types import FinishReason, InvalidRequest, RequestOutput

logger = logging.getLogger("fathom.api")

INVALID = "invalid_request_error"
# Pydantic puts the tried members of a union into an error's location; they name no field.
_UNION_TAGS = frozenset({"str", "int", "float", "bool", "dict"})


class ApiError(Exception):
    """A failure with its HTTP status.

    Attributes:
        status: HTTP status code. kind: OpenAI's ``type``. param: the field at fault, or None.
        code: machine-readable reason, or None. headers: extra HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The HTTP response; non-ASCII is escaped, so that any caller's text can be echoed."""
        return Response(
            json.dumps(self.body()),
            status_code=self.status,
            headers=self.headers,
            media_type="application/json",
        )


def model_not_found(name: str) -> ApiError:
    """404 for a model that this server does not serve."""
    return ApiError(
        404,
        f"The model {name!r} does not exist; GET /v1/models lists what does.",
        param="model",
        code="model_not_found",
    )


def missing_or_wrong_key(message: str) -> ApiError:
    """401 for a request without a valid API key."""
    return ApiError(
        401,
        message,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def operators_only(variable: str) -> ApiError:
    """403 for an API key that is no operator's, where operators have keys of their own."""
    return ApiError(
        403,
        "This API key may not change operating points: that takes an operator's key, one of "
        f"{variable} where the server was started.",
        kind="permission_error",
        code="operator_key_required",
    )


def body_too_large(limit: int) -> ApiError:
    """413 for a body of more than ``limit`` bytes."""
    return ApiError(
        413,
        f"The request body is larger than {limit} bytes; send less, or in several requests.",
        code="request_too_large",
    )


def deadline_exceeded(message: str) -> ApiError:
    """504 for a request that ran out of time."""
    return ApiError(504, message, kind="timeout_error", code="deadline_exceeded")


def engine_unavailable(message: str) -> ApiError:
    """503 when no engine can answer."""
    return ApiError(503, message, kind="server_error", code="engine_unavailable")


def stream_not_found(request_id: str) -> ApiError:
    """404 for a stream that nobody can go on with."""
    return ApiError(
        404,
        f"There is no stream {request_id!r} to go on with: it was never one of this API key's, or "
        "it is no longer kept. Send the request again without Last-Event-ID.",
        param="X-Request-Id",
        code="stream_not_found",
    )


def event_not_found(number: int) -> ApiError:
    """404 for a client that says it saw more than is known of its stream."""
    return ApiError(
        404,
        f"Last-Event-ID {number} is above the last event that is kept of this stream. Send the "
        "request again without Last-Event-ID and under another X-Request-Id.",
        param="Last-Event-ID",
        code="event_not_found",
    )


def other_body(request_id: str) -> ApiError:
    """409 for an id that names a stream of another request."""
    return ApiError(
        409,
        f"X-Request-Id {request_id!r} names a stream that was asked for with another body. Send "
        "that body again to go on with it, or another X-Request-Id.",
        param="X-Request-Id",
        code="request_id_in_use",
    )


def model_changed() -> ApiError:
    """409 for a stream that another model began."""
    return ApiError(
        409,
        "This stream was begun by a model that is no longer served. Send the request again under "
        "another X-Request-Id.",
        param="model",
        code="model_changed",
    )


def journal_unavailable() -> ApiError:
    """503 while nobody can tell what a client has seen."""
    return ApiError(
        503,
        "The journal of streams does not answer; try again with the same Last-Event-ID.",
        kind="server_error",
        code="journal_unavailable",
        headers={"Retry-After": "1"},
    )


def stream_taken_over() -> ApiError:
    """409 for a connection whose stream another connection goes on with."""
    return ApiError(
        409,
        "Another connection has asked for the rest of this stream and gets it.",
        param="X-Request-Id",
        code="stream_taken_over",
    )


def other_model(message: str) -> ApiError:
    """409 for operating points that were measured on something else than what is served."""
    return ApiError(409, message, param="points", code="other_model")


def promoted_meanwhile() -> ApiError:
    """409 for a promotion that another one has overtaken."""
    return ApiError(
        409,
        "Another promotion or rollback came while this one was under way, and holds. See GET "
        "/v1/operating_points, and ask again if need be.",
        code="promoted_meanwhile",
    )


def not_all_yet(seconds: float) -> ApiError:
    """504 for a promotion that some process has not heard of in time."""
    return ApiError(
        504,
        f"Not every replica and ingress has the operating points after {seconds:g} s; those that "
        "have not will get them as soon as they are up. Ask again to wait for them.",
        kind="timeout_error",
        code="takeover_pending",
    )


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as an API error; an unknown one is logged and told to no client."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case QueueFull():
            return ApiError(
                429,
                str(error),
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(error.retry_after_s)},
            )
        case BackendUnavailable():
            return engine_unavailable(str(error))
        case RequestValidationError():
            return _from_validation(error.errors())
        case HTTPException():
            return _from_http(error)
    logger.error("Unexpected error", exc_info=error)
    return ApiError(
        500, "The server failed on this request.", kind="server_error", code="internal_error"
    )


def failure_of(out: RequestOutput) -> ApiError | None:
    """The error that a completion ended with, or None if it ended well or goes on."""
    match out.finish_reason:
        case FinishReason.DEADLINE:
            return deadline_exceeded(out.error or "The request ran out of time.")
        case FinishReason.CANCELLED:
            return engine_unavailable(out.error or "The request was cancelled by the server.")
        case FinishReason.ERROR:
            return ApiError(
                500,
                out.error or "The engine failed on this request.",
                kind="server_error",
                code="engine_error",
            )
    return None


def install_error_handlers(app: FastAPI) -> None:
    """Let every failure of ``app`` answer in OpenAI's form."""

    async def handle(request: HttpRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            return _from_routing(request, error).response()
        return as_api_error(error).response()

    for kind in (
        ApiError,
        InvalidRequest,
        QueueFull,
        BackendUnavailable,
        RequestValidationError,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, handle)


def _from_routing(request: HttpRequest, error: HTTPException) -> ApiError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"Unknown request URL: {where}.", code="unknown_url")
    allowed = dict(error.headers or {})
    return ApiError(405, f"Not allowed: {where}.", code="method_not_supported", headers=allowed)


def _from_http(error: HTTPException) -> ApiError:
    if error.status_code == 413:
        return ApiError(413, str(error.detail), code="request_too_large")
    kind = INVALID if error.status_code < 500 else "server_error"
    return ApiError(error.status_code, str(error.detail), kind=kind, headers=error.headers)


def _from_validation(errors: Sequence[Any]) -> ApiError:
    """Turn FastAPI's list of errors into one sentence about the first field at fault."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "syntax error")
        return ApiError(400, f"The request body is not valid JSON: {reason}.", code="invalid_json")
    location = [part for part in first["loc"] if part != "body"]
    if not location:
        # Also for other content types: web pages may send those here without being asked.
        message = "The request body must be a JSON object, sent as Content-Type: application/json."
        return ApiError(400, message, code="invalid_json")
    param = _param(location)
    same_field = [e for e in errors if list(e["loc"])[1:2] == location[:1]]
    reasons = dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in same_field)
    return ApiError(400, f"{param}: {'; or '.join(reasons)}.", param=param)


def _param(location: Sequence[Any]) -> str:
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part in _UNION_TAGS or "[" in part or "-" in part:
            break
        else:
            name += f".{part}" if name else part
    return name
