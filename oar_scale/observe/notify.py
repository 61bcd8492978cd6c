"""``observe.notify``: each alert of a stage goes to a command or a webhook, as one JSON object.

    {"version": 1, "time": 1764390000.0, "kind": "failed", "severity": "critical", "title": "failed: emoji pretrain",
     "text": "the stage has ended: RuntimeError: ...", "run": "emoji", "stage": "pretrain", "step": null, "host": "node-3",
     "run_dir": "/data/runs/emoji", "root": "s3://bucket/emoji"}

A thread of the driver reads the event files and sends what :mod:`oar_scale.observe.alarms` makes of them. How the stage failed for good
is sent by whoever knows it (:mod:`oar_scale.observe.failure`). Nothing here holds a training up or ends it: a try lasts at most
``TRY_S``, there are ``TRIES`` of them, and a hook that does not work is one warning in the log. The webhook's address is read from the
environment when it is used, and is in no message, file or log.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from oar_scale.config.run_sections import AlertKind, NotifyConfig
from oar_scale.config.schema import Recipe
from oar_scale.json_object import JsonObject
from oar_scale.observe.alarms import ALERT_AGE_S, MILD, Alarms, Alert, Silence, title
from oar_scale.observe.events import EventReader
from oar_scale.observe.state import PROGRESS, StageState

log = logging.getLogger(__name__)

POLL_S = 1.0
TRY_S = 10.0
"""How long a command may run, or a webhook take to answer."""
TRIES = 3
PAUSE_S = 2.0
"""Between two tries."""
WAITING = 100
"""Alerts that may wait for a slow hook; more are dropped."""

_warned: set[tuple[str, str]] = set()
"""Runs and hooks that a failure was logged of."""


class Hook:
    """Sends alerts of one stage to where the recipe says."""

    def __init__(self, events: str, stage: str, recipe: Recipe, root: str) -> None:
        """``events``: local folder of the run's events."""
        self._stage, self._recipe, self._root = stage, recipe, root
        self._run_dir = os.path.dirname(os.path.abspath(events))

    def send(self, kind: AlertKind, text: str, at: float, step: int | None = None) -> None:
        """Send one alert, if its kind is asked for. Never raises; returns within ``TRIES`` tries of each hook."""
        notify = self._recipe.observe.notify
        if kind not in notify.kinds:
            return
        body = json.dumps(self._alert(kind, text, at, step)).encode()
        for name, fault in _deliver(notify, body):
            if (self._run_dir, name) not in _warned:
                log.warning("observe.notify: the %s did not take an alert (%s); further failures are not logged", name, fault)
            _warned.add((self._run_dir, name))

    def _alert(self, kind: AlertKind, text: str, at: float, step: int | None) -> JsonObject:
        return {
            "version": 1,
            "time": at,
            "kind": kind,
            "severity": "warning" if kind in MILD else "critical",
            "title": title(kind, self._recipe.name, self._stage),
            "text": text,
            "run": self._recipe.name,
            "stage": self._stage,
            "step": step,
            "host": socket.gethostname(),
            "run_dir": self._run_dir,
            "root": self._root,
        }


class Notifier:
    """Follows a stage's events from now on, and sends the alerts that they make."""

    def __init__(self, events: str, stage: str, recipe: Recipe, root: str) -> None:
        self._hook, self._reader = Hook(events, stage, recipe, root), EventReader(events, stage)
        self._alarms, self._state, self._silence = Alarms(), StageState(stage), Silence(recipe.observe.stall_s)
        self._read(silently=True)  # what a worker's usual speed is, and how often the workers were started
        self._state.begins()
        self._ended = threading.Event()
        self._queue: queue.Queue[Alert | None] = queue.Queue(WAITING)
        self._sender = threading.Thread(target=self._send, name=f"notify-{stage}", daemon=True)
        self._follower = threading.Thread(target=self._follow, name=f"alarms-{stage}", daemon=True)
        self._sender.start()
        self._follower.start()

    def stop(self, wait_s: float) -> None:
        """Send what is due, and wait for it at most ``wait_s``."""
        until = time.monotonic() + wait_s
        self._ended.set()
        self._follower.join(wait_s)
        self._sender.join(max(0.0, until - time.monotonic()))

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(POLL_S)
            try:
                self._read()
                due = self._silence.noticed(waiting=self._state.waits)
                if due and self._state.status != "done":
                    self._put(Alert(-1, time.time(), *due))
            except Exception as error:  # a view of the stage must not be able to end it; tried again
                log.warning("observe.notify: %s: %s", type(error).__name__, error)
                self._ended.wait(60.0)
        self._queue.put(None)

    def _read(self, silently: bool = False) -> None:
        for entry in self._reader.poll():
            if self._state.take(entry.attempt, entry.event):
                self._alarms.begin_anew()
            if entry.event["kind"] in PROGRESS:
                self._silence.progress()
            for alert in self._alarms.take(entry.event):
                if not silently and alert.kind != "failed" and time.time() - alert.time < ALERT_AGE_S:
                    self._put(alert)

    def _put(self, alert: Alert) -> None:
        with suppress(queue.Full):  # the hook has been down for long, and that is in the log
            self._queue.put_nowait(alert)

    def _send(self) -> None:
        while (alert := self._queue.get()) is not None:
            self._hook.send(alert.kind, alert.text, alert.time, alert.step)


def _deliver(notify: NotifyConfig, body: bytes) -> list[tuple[str, str]]:
    """Hand the alert to the command and the webhook; what each that failed in all its tries is called, and why it failed."""
    faults = []
    if notify.command and (fault := _tried(lambda: _run(notify.command, body))):
        faults.append((f"command {Path(notify.command[0]).name}", fault))
    if notify.webhook and (fault := _tried(lambda: _post(str(notify.webhook).removeprefix("$"), body))):
        faults.append((f"webhook {notify.webhook}", fault))
    return faults


def _tried(action: Callable[[], str]) -> str:
    """What went wrong in the last try; empty where one of them worked."""
    fault = ""
    for number in range(TRIES):
        time.sleep(PAUSE_S if number else 0.0)
        try:
            fault = action()
        except Exception as error:  # its text may hold the address
            fault = type(error).__name__
        if not fault:
            break
    return fault


def _run(command: tuple[str, ...], body: bytes) -> str:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.communicate(body, timeout=TRY_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its own session: what it has started as well
        process.wait()
        return f"not done within {TRY_S:g} s"
    return f"exit code {process.returncode}" if process.returncode else ""


def _post(variable: str, body: bytes) -> str:
    address = os.environ.get(variable)
    if not address:
        return f"the environment has no {variable}"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json", "User-Agent": "oar_scale"})
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(_ask(request)), name="notify-webhook", daemon=True)
    asking.start()
    asking.join(TRY_S)  # urllib's own limit begins anew with each byte that comes
    return answers[0] if answers else f"no answer within {TRY_S:g} s"


def _ask(request: urllib.request.Request) -> str:
    try:
        urllib.request.build_opener(_NoRedirect).open(request, timeout=TRY_S).close()
    except urllib.error.HTTPError as error:
        return f"HTTP status {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {type(error).__name__}"
    except Exception as error:  # its text may hold the address
        return type(error).__name__
    return ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """To follow a redirect would turn the POST into a GET, which delivers nothing; without an answer from here it is an HTTPError."""

    def redirect_request(self, *_: object) -> None:
        """Follow none."""
