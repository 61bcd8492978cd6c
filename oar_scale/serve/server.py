"""``oar serve``: takes the port, loads the model, and answers until it is told to stop."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import resource
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

import psutil
import torch
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from oar_scale.errors import UserError
from oar_scale.generation.pretrained import Pretrained, load_pretrained
from oar_scale.generation.slots import BRANCHES
from oar_scale.model import AnyOrderModel, Decoder
from oar_scale.run.gpu_node import chosen_device
from oar_scale.serve.app import make_app
from oar_scale.serve.guard import Access
from oar_scale.serve.limits import Limits
from oar_scale.serve.service import Service

TOKEN = "OAR_SERVE_TOKEN"
_SHORTEST_TOKEN = 16
_MOST_SLOTS = 64
_CACHE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
"""Of the KV cache, unless the user says how many slots there are."""
_BACKLOG = 2048
_CLOSE_S = 5
"""For connections once everything has been answered."""


@dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """What the command line says."""

    model: str
    which: str | None
    host: str
    port: int
    """0: any that is free."""
    token: str | None
    device: str | None
    dtype: str
    slots: int | None


def serve(request: ServeRequest, say: Callable[[str], None], limits: Limits | None = None) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    Raises:
        UserError: the port is taken, an address without a token that others can reach, or a model that cannot draw images.
    """
    token = request.token or os.environ.get(TOKEN) or None
    local = _is_loopback(request.host)
    if not local and token is None:
        raise UserError(f"--host {request.host}: others can reach it, so it wants a token: set {TOKEN}, or --token")
    if token is not None and len(token) < _SHORTEST_TOKEN:
        raise UserError(f"the token has {len(token)} characters, which can be guessed: take at least {_SHORTEST_TOKEN}")
    listener = listen(request.host, request.port)
    with listener:
        drawer = load(request)
        name = os.path.basename(os.path.abspath(request.model)) or "model"
        slots = request.slots or default_slots(drawer.model)
        _check_memory(drawer.model, slots)
        service = Service(drawer, name, slots, limits or Limits())
        app = make_app(service, Access(request.host, token))
        _allow_many_connections()
        port = listener.getsockname()[1]
        host = f"[{request.host}]" if ":" in request.host else request.host
        say(f"serving {name} on http://{host}:{port} ({slots} slots, {next(drawer.model.parameters()).device}); Ctrl-C stops it")
        Server(app, service, say).run([listener])


class Server(uvicorn.Server):
    """uvicorn's server, which lets jobs end before it stops. A second signal stops it at once."""

    def __init__(self, app: ASGIApp, service: Service, say: Callable[[str], None]) -> None:
        config = uvicorn.Config(
            app,
            http=connections(service.limits.body_s),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_S,
            backlog=_BACKLOG,
        )
        super().__init__(config)
        self._service, self._say = service, say
        self._draining: asyncio.Task[None] | None = None
        self._told = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal: stop. Ctrl-C is how a server is stopped, so no signal is passed on."""
        if self._told:
            self.should_exit = self.force_exit = True
        self._told = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. Returns whether to stop now."""
        if self._told and self._draining is None:
            with suppress(BrokenPipeError):  # nobody reads what we say
                self._say(f"stopping: what is being drawn has {self._service.limits.drain_s:g} s; a second Ctrl-C stops at once")
            self._draining = asyncio.create_task(self._service.drain())
        self.should_exit = self.should_exit or (self._draining is not None and self._draining.done())
        return await super().on_tick(counter)


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


def _allow_many_connections() -> None:
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


def load(request: ServeRequest) -> Pretrained:
    """The model, ready to draw. Raises UserError for one that cannot."""
    drawer = load_pretrained(request.model, request.which)
    if drawer.vq is None:
        raise UserError(f"{request.model}: a model without an image tokenizer draws codes only. Name the folder of a run or an export.")
    if drawer.text is None:
        raise UserError(f"{request.model}: nobody knows what its captions are encoded with. Name its run's folder, or an export of that.")
    device = chosen_device(request.device)
    drawer.to(device, {"fp32": torch.float32, "bf16": torch.bfloat16}[request.dtype])
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - 1)))  # one core answers requests
    return drawer


def default_slots(model: AnyOrderModel) -> int:
    """Images that share a pass: more of them cost less each, and their KV cache takes memory."""
    limit = _CACHE_BYTES["cuda" if next(model.parameters()).is_cuda else "cpu"]
    return max(1, min(_MOST_SLOTS, limit // _slot_bytes(model)))


def _slot_bytes(model: AnyOrderModel) -> int:
    return Decoder(model).image_bytes(model.null_condition(1)) * BRANCHES


def _check_memory(model: AnyOrderModel, slots: int) -> None:
    """Raise UserError where the KV cache of so many slots does not fit."""
    device, needed = next(model.parameters()).device, slots * _slot_bytes(model)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise UserError(f"--slots {slots}: their KV cache takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: take fewer")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
