"""What stands before every request: who may ask, and how much may be read at once.

    Host        where the server listens on loopback, only names of loopback: a page of another site that gave itself our address
                (DNS rebinding) is refused
    Origin      without a token, requests that change something come from no other site's pages
    token       as ``Authorization: Bearer``, never in an address; the page's own files and /healthz need none
    body        a bound for each, and for all that are being read together

Answers get headers that keep browsers from running anything but the page's own files.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oar_scale.serve.api_errors import ApiError, bad_request, full
from oar_scale.serve.limits import BodyLimits

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_OPEN = ("/", "/healthz", "/favicon.ico")
_OPEN_FOLDERS = ("/static/", "/healthz/")
_SAFE = ("GET", "HEAD", "OPTIONS")
_READ = "oar_body_was_read"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True)
class Access:
    """Who may ask, of a server at ``host``."""

    host: str

    token: str | None
    """Wanted of all. None: of nobody, who then must name this machine: else a page elsewhere could ask through a browser here (DNS
    rebinding)."""

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raises ApiError for a request that is not allowed."""
        host = headers.get("host", "")
        if self.token is None and _name(host) not in LOOPBACK | {self.host}:
            raise bad_request("this server listens on loopback and answers to localhost, 127.0.0.1 and [::1] only", code="wrong_host")
        origin = headers.get("origin")
        own = (None, f"http://{host}", f"https://{host}")
        if self.token is None and method not in _SAFE and origin not in own:
            raise ApiError(403, "requests from pages of other sites are refused", code="wrong_origin")
        if self.token is None or path in _OPEN or path.startswith(_OPEN_FOLDERS):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode()):
            raise ApiError(401, "this server wants its token: Authorization: Bearer TOKEN", code="invalid_api_key")


class Guard:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, access: Access, limits: BodyLimits, answered: Callable[[str, int], None] | None = None) -> None:
        """
        Args:
            answered: called with path and status of each answer.
        """
        self.app, self.access, self.limits, self._answered = app, access, limits, answered
        self.bodies_bytes = 0
        """Of requests that are being read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = _Body(self, receive)
        scope[_READ] = body.let_go
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                body.let_go()
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        try:
            self.access.check(scope["method"], scope["path"], headers)
            body.announce(headers.get("content-length"))
        except ApiError as error:
            await error.response()(scope, receive, answer)
        else:
            try:
                await self.app(scope, body.receive, answer)
            except Exception:
                if not status:  # else it was logged and answered
                    raise
        finally:
            body.let_go()
            if self._answered is not None:
                self._answered(getattr(scope.get("route"), "path", "other"), status)


class _Body:
    """The body of one request, as far as it has been read."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self._guard, self._receive = guard, receive
        self._held = self._read = 0
        self._end = time.monotonic() + guard.limits.body_s
        self._whole = False

    def announce(self, content_length: str | None) -> None:
        """Make room for all of it. Raises ApiError where there is none."""
        self._hold(int(content_length) if content_length and content_length.isdecimal() else 0)

    async def receive(self) -> Message:
        """The next message. Raises ApiError for a body that is too large, or does not come."""
        if self._whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._end - time.monotonic()))
        except TimeoutError as error:
            raise ApiError(408, f"the request was not there after {self._guard.limits.body_s:g} s") from error
        self._whole = message["type"] != "http.request" or not message.get("more_body", False)
        self._read += len(message.get("body", b""))
        self._hold(self._read)
        return message

    def let_go(self) -> None:
        """What was read is in other hands, or not needed any more."""
        self._guard.bodies_bytes -= self._held
        self._held = 0

    def _hold(self, count: int) -> None:
        limits, more = self._guard.limits, count - self._held
        if count > limits.body_bytes:
            raise ApiError(413, f"the request has more than {limits.body_bytes} bytes", code="request_too_large")
        if more <= 0:
            return
        if self._guard.bodies_bytes + more > limits.bodies_bytes:
            raise full("too much is being sent at once: try again later")
        self._guard.bodies_bytes += more
        self._held = count


def body_was_read(scope: Scope) -> None:
    """What a request held for its body is free for others: its job is in the queue, whose bounds count from now on."""
    scope[_READ]()


def _name(host: str) -> str:
    """A Host header without its port."""
    return (host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]).lower()
