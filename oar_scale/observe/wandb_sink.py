"""W&B as a view of the event files: call it after a stage (or again at any time), and the run there catches up.

The files are the truth; a small ``STAGE.wandb.json`` beside them holds the W&B run id and the last step it has, so that
restarts go on in the same W&B run and no step is sent twice. Nothing here can fail a run: whatever goes wrong is one
warning in the log, and without a key or a network the W&B run is kept offline (``wandb sync`` uploads it later).
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import uuid
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from oar_scale.observe.events import Event, read_events

log = logging.getLogger(__name__)

INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 60.0


def project(events_folder: str, recipe_name: str, stage: str, mode: Literal["off", "offline", "online"], project: str) -> None:
    """Bring the W&B run of a stage up to date with its event files. Never raises.

    Args:
        events_folder: local folder of the run's events; W&B's own files go into ``wandb/`` beside it.
        recipe_name: groups the stages of one recipe; first part of the run's name.
        stage: the stage whose events are sent.
        mode: ``off`` does nothing; ``online`` falls back to offline when there is no key or no answer.
        project: the W&B project.
    """
    if mode == "off":
        return
    try:
        _send(events_folder, recipe_name, stage, mode, project)
    except Exception as error:  # a view of the run must not be able to end it
        log.warning("W&B did not get the events of %s (%s: %s); they are in %s", stage, type(error).__name__, error, events_folder)


def _send(folder: str, recipe_name: str, stage: str, mode: Literal["offline", "online"], project: str) -> None:
    state_file = Path(folder) / f"{stage}.wandb.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    run_id, last_step = state.get("run_id") or uuid.uuid4().hex[:12], int(state.get("last_step", -1))
    events = read_events(folder, stage)
    points = sorted((p for e in events if (p := _point(e)) and p[0] > last_step), key=lambda p: p[0])
    if not points:
        return

    import wandb

    if mode == "online" and not _has_key(wandb.setup().settings.base_url):
        log.warning("W&B: no WANDB_API_KEY and none in ~/.netrc; the run of %s is kept offline", stage)
        mode = "offline"
    arguments: dict[str, Any] = {
        "project": project,
        "group": recipe_name,
        "name": f"{recipe_name}-{stage}",
        "id": run_id,
        "resume": "allow",
        "dir": os.path.dirname(os.path.abspath(folder)),
        "config": {k: v for e in events if e["kind"] == "start" for k, v in e.items() if k not in ("time", "kind")},
    }
    settings: dict[str, Any] = {"init_timeout": INIT_TIMEOUT_S, "finish_timeout": FINISH_TIMEOUT_S, "silent": True, "console": "off"}
    try:
        run = wandb.init(mode=mode, settings=wandb.Settings(**settings), **arguments)
    except wandb.Error as error:
        if mode == "offline":
            raise
        log.warning("W&B did not answer (%s); the run of %s is kept offline", error, stage)
        wandb.teardown()  # the failed start still holds the run id
        run = wandb.init(mode="offline", settings=wandb.Settings(**settings), **arguments)
    try:
        for step, values in points:
            run.log(values, step=step)
    finally:
        run.finish()
    state_file.write_text(json.dumps({"run_id": run_id, "last_step": points[-1][0]}))


def _point(event: Event) -> tuple[int, dict[str, float]] | None:
    """The numbers of an event under ``kind/name``, at its step (a pool's step is its count); None when it has no step."""
    step = event.get("step", event.get("done"))
    if step is None:
        return None
    numbers = {name: value for name, value in event.items() if isinstance(value, int | float) and name not in ("time", "step", "done")}
    return int(step), {f"{event['kind']}/{name}": value for name, value in numbers.items()}


def _has_key(base_url: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlparse(base_url).hostname or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
