"""How a stage failed, where everybody finds it: an event ``failed``, and an alert to ``observe.notify``.

    final       nothing starts the stage again by itself: the recipe has to be corrected, or nobody watches over the driver
    not final   a job file or a Ray job starts the driver again after a pause; it reports itself when it gives up (launch/report_failure.py)

A stop that was asked for, with everything saved, is no failure. A driver that is killed says nothing: the W&B process beside it, the
job around it, and Prometheus' rule for a driver that is gone do.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from oar_scale.config.schema import Recipe
from oar_scale.errors import Requeue, UserError, error_line, first_line
from oar_scale.observe.formatting import message
from oar_scale.observe.mirror import open_log
from oar_scale.observe.notify import Hook
from oar_scale.redaction import redact

RETRIED = "OAR_RETRIED"
"""Set in the environment of a driver that is started again when it fails."""
LATER = "OAR_LATER_STAGES"
"""Set where later jobs of the same submission do more stages: their names."""
_REPORTED = "_oar_reported"
"""Attribute of an error that has been reported."""
Ending = Literal["done", "continued", "stopped", "retried", "failed"]
"""How a driver ends; ``continued``: it is done, and a later job goes on."""
log = logging.getLogger(__name__)


@contextmanager
def reporting_failure(events: str, stage: str, recipe: Recipe, root: str) -> Iterator[None]:
    """Report how the ``with`` body fails, if it does; see :func:`report_failure`. What goes wrong with that is a warning.

    One inside another reports alone: the outer one is for what fails around it.
    """
    try:
        yield
    except BaseException as error:
        how = ending(error)
        if how in ("failed", "retried") and not vars(error).get(_REPORTED):
            vars(error)[_REPORTED] = True
            why = first_line(str(error)) if isinstance(error, UserError) else error_line(error)
            try:
                report_failure(events, stage, recipe, root, why, final=how == "failed")
            except Exception as fault:  # the failure itself is what matters
                log.warning("the failure could not be reported: %s: %s", type(fault).__name__, fault)
        raise


def ending(error: BaseException | None) -> Ending:
    """How a driver ends that ends with this error."""
    match error:
        case None:
            return "continued" if os.environ.get(LATER) else "done"
        case Requeue() | KeyboardInterrupt() | SystemExit():  # SIGTERM, where Ray is ours (runtime/ray_session.py)
            return "stopped"
        case UserError():
            return "failed"
    return "retried" if os.environ.get(RETRIED) else "failed"


def report_failure(events: str, stage: str, recipe: Recipe, root: str, why: str, *, final: bool) -> None:
    """Record that the stage has failed, and tell ``observe.notify``.

    Args:
        events: local folder of the run's events.
        why: one line; what looks like a secret in it is masked.
    """
    why = redact(why)
    fields = {"cause": why, "final": final, "host": socket.gethostname(), "pid": os.getpid()}
    try:
        with open_log(events, stage, root, recipe.observe.mirror_s) as written:
            written.emit("failed", **fields)
    finally:
        Hook(events, stage, recipe, root).send("failed", message({"kind": "failed", **fields}) or why, time.time())
