"""The port, the connections, the signals: what every server of ``oar`` does in the same way."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import resource
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from oar_scale.errors import UserError
from oar_scale.serve.guard import Access
from oar_scale.serve.limits import BodyLimits

TOKEN = "OAR_SERVE_TOKEN"
_SHORTEST_TOKEN = 16
_BACKLOG = 2048
_CLOSE_S = 5
"""For connections once everything has been answered."""


class HttpServer(uvicorn.Server):
    """uvicorn's server with quiet logs. Ctrl-C is how it is stopped, so no signal is passed on; a second one stops it at once."""

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        config = uvicorn.Config(
            app,
            http=connections(limits.body_s),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_S,
            backlog=_BACKLOG,
        )
        super().__init__(config)
        self.told = False
        """To stop."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal."""
        if self.told:
            self.should_exit = self.force_exit = True
        self.told = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. Returns whether to stop now."""
        self.should_exit = self.should_exit or (self.told and self.ready_to_stop())
        return await super().on_tick(counter)

    def ready_to_stop(self) -> bool:
        """Whether a server that was told to stop has ended what it began."""
        return True


def access_to(host: str, token: str | None) -> Access:
    """Who may ask a server at this address.

    Args:
        token: what the command line says; else the environment does.

    Raises:
        UserError: others can reach the address, and there is no token; or one that can be guessed.
    """
    token = (token or os.environ.get(TOKEN) or "").strip() or None  # no header can end in the line break of a file or a Secret
    if token is None and not _is_loopback(host):
        raise UserError(f"--host {host}: others can reach it, so it wants a token: set {TOKEN}, or --token")
    if token is not None and len(token) < _SHORTEST_TOKEN:
        raise UserError(f"the token has {len(token)} characters, which can be guessed: take at least {_SHORTEST_TOKEN}")
    return Access(host, token)


def address_of(host: str, listener: socket.socket) -> str:
    """Where a browser finds it."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"


def connections(limit_s: float) -> type[H11Protocol]:
    """HTTP connections, which are closed if they send no whole request header within so many seconds."""

    class Connection(H11Protocol):
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_request()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._await_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _await_request(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._patience is None:
                self._patience = self.loop.call_later(limit_s, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

    return Connection


def allow_many_connections() -> None:
    """Each takes a file descriptor, and the usual limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)  # now, so that a second server is refused before it loads a model
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}. Another server may run there: "
            "take another --port (0: any that is free), or stop it."
        ) from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
