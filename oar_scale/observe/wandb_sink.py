"""W&B as a view of the event files: a process of its own sends them, during a stage or after it.

The files are the truth; ``STAGE.wandb.json`` beside them is that process' state (:mod:`oar_scale.observe.wandb_process`).
Nothing here can fail a run or hold it up: whatever goes wrong is a warning in the log, all waiting is bounded, and what
W&B has not got by then is sent the next time. Without a key or a network the W&B run is kept offline.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psutil

import oar_scale
from oar_scale.observe.wandb_lock import kill_tree
from oar_scale.observe.wandb_process import WandbSpec, is_delivered

log = logging.getLogger(__name__)

WAIT_S = 10.0
"""How long the end of a stage waits for W&B."""
ARTIFACT_WAIT_S = 600.0
"""The same where a model is to be uploaded."""


class WandbProcess:
    """The running process of one stage."""

    def __init__(self, spec: WandbSpec, say: Callable[[str], None]) -> None:
        """Start the process. ``say`` gets the messages for the user, such as the run's address; warnings go to the log."""
        folder = Path(spec.events).absolute().parent / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        package = str(Path(oar_scale.__file__).parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        with open(folder / f"{spec.stage}.log", "ab") as chatter:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "oar_scale.observe.wandb_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=chatter,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is the driver's
            )
        self._stage, self._say = spec.stage, say
        self._relay = threading.Thread(target=self._relay_messages, name=f"wandb-{spec.stage}", daemon=True)
        self._relay.start()
        self._send(json.dumps(asdict(spec)))

    def stop(self, wait_s: float) -> bool:
        """Let it send what is written; end it when that takes longer than ``wait_s``. Returns whether it ended by itself."""
        until = time.monotonic() + wait_s
        self._send("end")
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(max(0.0, until - time.monotonic()))
            finished = True
        except subprocess.TimeoutExpired:
            finished = False
            log.warning("W&B did not finish with %s within %.0f s; the rest is sent when the run is resumed", self._stage, wait_s)
            self._kill()
        self._relay.join(1.0)
        return finished

    def _kill(self) -> None:
        with contextlib.suppress(psutil.Error):
            kill_tree(psutil.Process(self._process.pid))
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)

    def _send(self, line: str) -> None:
        with contextlib.suppress(OSError):  # it has ended; its last messages are in the log
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def _relay_messages(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                level, text = json.loads(line)
                if level == "info":
                    self._say(text)
                else:
                    log.warning("%s", text)


def send_stage(spec: WandbSpec, say: Callable[[str], None], wait_s: float = WAIT_S) -> bool:
    """Bring the W&B run of a stage up to date with its event files, if it is not. Never raises, and waits at most ``wait_s``.

    Returns:
        Whether W&B has everything.
    """
    try:
        if not is_delivered(spec.events, spec.stage):
            WandbProcess(spec, say).stop(wait_s)
        return is_delivered(spec.events, spec.stage)
    except Exception as error:  # a view of the run must not be able to end it
        log.warning("W&B did not get the events of %s (%s: %s); they are in %s", spec.stage, type(error).__name__, error, spec.events)
        return False
