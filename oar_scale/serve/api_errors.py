"""Errors as clients of OpenAI's API read them: ``{"error": {"message", "type", "param", "code"}}`` with a status of HTTP, on every path."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from oar_scale.errors import UserError, error_line
from oar_scale.text import shown

log = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_BROKEN = "the server failed at this request, and goes on with others; its log says more"


class ApiError(Exception):
    """A request that is refused, or a job that failed."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after_s = status, message, param, code, retry_after_s

    @property
    def body(self) -> dict[str, str | None]:
        """What clients read as ``error``."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def response(self) -> JSONResponse:
        """The answer to the request."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": self.body}, self.status, headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An error that the client can fix."""
    return ApiError(400, message, param=param, code=code)


def full(message: str) -> ApiError:
    """The server has too much to do."""
    return ApiError(429, message, code="server_busy", retry_after_s=RETRY_AFTER_S)


def of_exception(error: BaseException) -> ApiError:
    """The error for the client; what it must not see is logged."""
    match error:
        case ApiError():
            return error
        case UserError():
            return bad_request(str(error))
        case ArithmeticError():  # of the model: its scores are no numbers
            return ApiError(500, str(error), code="not_numbers")
        case ClientDisconnect():
            return bad_request("the request was not sent to its end")
        case _:
            log.error("a request failed", exc_info=error)
            return ApiError(500, _BROKEN)


def invalid(errors: list[Mapping[str, object]]) -> ApiError:
    """The first of the faults that pydantic found in a request."""
    first = errors[0]
    path = [str(part) for part in cast("tuple[object, ...]", first["loc"]) if part not in ("body", "query", "path", "header")]
    param = path[0] if path else None
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such setting"
    elif first["type"] == "json_invalid":
        return bad_request(f"the request is no JSON: {cast('dict[str, object]', first.get('ctx', {})).get('error', message)}")
    given = "" if first["type"] in ("missing", "extra_forbidden") or path[1:] else f" (got {shown(first.get('input'))})"
    return bad_request(f"{'.'.join(path) or 'the request'}: {message}{given}", param)


def add_handlers(app: FastAPI) -> None:
    """Every error of the application becomes such an answer."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        return of_exception(error).response()

    async def not_valid(request: Request, error: Exception) -> JSONResponse:
        return invalid(list(cast("RequestValidationError | ValidationError", error).errors())).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error.__cause__, ApiError):  # FastAPI makes one error of all that happens while it reads a body
            return error.__cause__.response()
        if error.__cause__ is not None:
            return bad_request(f"the request cannot be read ({error_line(error.__cause__)})").response()
        text = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not possible here"}
        return ApiError(error.status_code, text.get(error.status_code, str(error.detail))).response()

    handlers = ((refused, (ApiError, UserError, ClientDisconnect, Exception)), (not_valid, (RequestValidationError, ValidationError)))
    for handler, kinds in handlers:
        for kind in kinds:
            app.add_exception_handler(kind, handler)
    app.add_exception_handler(HTTPException, http)
