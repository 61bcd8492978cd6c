"""``oar serve``: takes the port, loads the model, and answers until it is told to stop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import psutil
import torch
from starlette.types import ASGIApp

from oar_scale.errors import UserError
from oar_scale.generation.model_bundle import find_bundle
from oar_scale.generation.pretrained import Pretrained, load_bundle
from oar_scale.generation.slots import BRANCHES
from oar_scale.model import AnyOrderModel, Decoder
from oar_scale.run.gpu_node import chosen_device
from oar_scale.serve.app import make_app
from oar_scale.serve.limits import Limits
from oar_scale.serve.listening import HttpServer, access_to, address_of, allow_many_connections, listen
from oar_scale.serve.service import Service

_MOST_SLOTS = 64
_CACHE_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
"""Of the KV cache, unless the user says how many slots there are."""


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
    access = access_to(request.host, request.token)
    listener = listen(request.host, request.port)
    with listener:
        drawer = load(request)
        name = os.path.basename(os.path.abspath(request.model)) or "model"
        slots = request.slots or default_slots(drawer.model)
        _check_memory(drawer.model, slots)
        service = Service(drawer, name, slots, limits or Limits())
        app = make_app(service, access)
        allow_many_connections()
        device, address = next(drawer.model.parameters()).device, address_of(request.host, listener)
        say(f"serving {name} on {address} ({slots} slots, {device}); Ctrl-C stops it")
        Server(app, service, say).run([listener])


class Server(HttpServer):
    """Lets jobs end before it stops. A second signal stops it at once."""

    def __init__(self, app: ASGIApp, service: Service, say: Callable[[str], None]) -> None:
        super().__init__(app, service.limits)
        self._service, self._say = service, say
        self._draining: asyncio.Task[None] | None = None

    def ready_to_stop(self) -> bool:
        """Asked ten times a second: whether jobs have ended, or had their time."""
        if self._draining is None:
            with suppress(BrokenPipeError):  # nobody reads what we say
                self._say(f"stopping: what is being drawn has {self._service.limits.drain_s:g} s; a second Ctrl-C stops at once")
            self._draining = asyncio.create_task(self._service.drain())
        return self._draining.done()


def load(request: ServeRequest) -> Pretrained:
    """The model, ready to draw; nothing is written beside it. Raises UserError for one that cannot."""
    drawer = load_bundle(replace(find_bundle(request.model, request.which), read_only=True))
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
