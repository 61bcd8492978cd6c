"""All that watches a stage while it runs: the console, the W&B process, the metrics server, the copy from another host.

    with watching(events, "pretrain", recipe, root, console=console, steps=60_000):
        ...  # start the workers and wait for them

Each reads the event files by itself, in a thread or a process of its own. None of them can end the stage, and none can
hold it up: what fails is one warning in the log, and at the end of the stage all of them together get ``wait_s`` seconds.
Where there is no driver (torchrun), rank 0 does the same around its loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

from oar_scale.config.schema import Recipe
from oar_scale.observe.console import Console
from oar_scale.observe.events import EventReader
from oar_scale.observe.failure import reporting_failure
from oar_scale.observe.mirror import pull
from oar_scale.observe.notify import Notifier
from oar_scale.observe.prometheus import MetricsServer
from oar_scale.observe.wandb_process import WandbSpec
from oar_scale.observe.wandb_sink import ARTIFACT_WAIT_S, WAIT_S, WandbProcess, send_stage

log = logging.getLogger(__name__)

FIRST_PULL_S, LAST_PULL_S = 10.0, 3.0
"""How long the begin and the end of a stage wait for the events of other hosts."""
_COPY = "the copy of the events"
T = TypeVar("T")


class _Watcher(Protocol):
    def stop(self, wait_s: float) -> object:
        """Show what is written up to now, and end within ``wait_s``."""


@contextmanager
def watching(
    events: str,
    stage: str,
    recipe: Recipe,
    root: str,
    *,
    console: Console | None = None,
    steps: int | None = None,
    result: str | None = None,
    wait_s: float = WAIT_S,
) -> Iterator[None]:
    """Watch a stage while the ``with`` body runs it, here or in other processes.

    Args:
        events: local folder of the run's events.
        root: the run's storage; where it is in S3, attempts of other hosts are brought from there.
        console: follows the stage's progress up to ``steps``; without it (or them) nothing is printed about steps.
        result: the model that the stage exports, for ``observe.wandb_artifacts``.
        wait_s: how long the end of the stage waits for all of them.
    """
    observe, say = recipe.observe, console.say if console else log.info
    upload = result is not None and observe.wandb_artifacts and observe.wandb != "off"
    wanted: list[tuple[str, Callable[[], _Watcher]]] = []
    puller = _guarded(_COPY, lambda: _Puller(root, events, observe.mirror_s)) if root.startswith("s3://") else None
    whole = puller.succeeded.is_set if puller else lambda: True
    if console is not None and steps is not None:
        shown, last = console, steps
        wanted.append(("the console", lambda: _Entered(shown.follow(events, stage, last, observe.stall_s))))
    if observe.wandb != "off":
        wanted.append(("W&B", lambda: WandbProcess(wandb_spec(events, stage, recipe, root, result, wait_s), say)))
    if observe.notify.command or observe.notify.webhook:
        wanted.append(("observe.notify", lambda: Notifier(events, stage, recipe, root)))
    if observe.metrics_port is not None:  # the last to end: while the others finish, /healthz reports the outcome
        wanted.append(("/metrics", lambda: MetricsServer(events, stage, recipe.name, observe, say, whole)))
    begun: list[tuple[str, _Watcher]] = [(_COPY, puller)] if puller else []
    begun += [(name, each) for name, start in wanted if (each := _guarded(name, start)) is not None]
    failed = False
    try:
        with reporting_failure(events, stage, recipe, root):  # while the others still watch
            yield
    except BaseException as error:
        failed = True
        for _, each in begun:
            if isinstance(each, MetricsServer):
                each.fail(error)
        raise
    finally:
        until = time.monotonic() + (ARTIFACT_WAIT_S if upload and not failed else wait_s)
        for name, each in begun:
            _guarded(name, lambda each=each: each.stop(max(0.5, until - time.monotonic())))  # type: ignore[misc]


def wandb_spec(events: str, stage: str, recipe: Recipe, root: str, result: str | None = None, wait_s: float = WAIT_S) -> WandbSpec:
    """The settings of a stage's W&B process, whose driver waits for it ``wait_s``. ``observe.wandb`` must not be ``off``."""
    observe = recipe.observe
    assert observe.wandb != "off"
    return WandbSpec(
        events=events,
        stage=stage,
        recipe_name=recipe.name,
        root=root,
        mode=observe.wandb,
        project=observe.wandb_project,
        tags=observe.wandb_tags,
        config=recipe.model_dump(mode="json"),
        artifact=result if observe.wandb_artifacts else None,
        stall_s=observe.stall_s,
        finish_s=ARTIFACT_WAIT_S if observe.wandb_artifacts and result else max(1.0, wait_s - 2.0),
        before=EventReader(events, stage, from_now=True).ends,
    )


def catch_up(events: str, recipe: Recipe, root: str, stages: list[str], say: Callable[[str], None]) -> None:
    """Send W&B, after a run, the events of all stages that it lacks, up to the first stage that it does not accept in time."""
    for stage in stages if recipe.observe.wandb != "off" else ():
        if not send_stage(wandb_spec(events, stage, recipe, root), say):
            return


class _Entered:
    """A context manager as a watcher."""

    def __init__(self, context: AbstractContextManager[object]) -> None:
        self._context = context
        context.__enter__()

    def stop(self, wait_s: float) -> None:
        self._context.__exit__(None, None, None)


class _Puller:
    """Brings the events of attempts on other hosts here: at once, so that what is counted goes on from there, then every ``every_s``."""

    def __init__(self, root: str, folder: str, every_s: float) -> None:
        """Returns when the first events are here, after ``FIRST_PULL_S`` at the latest."""
        self._root, self._folder, self._every_s = root, folder, every_s
        self._ended, self._pulled, self._failing = threading.Event(), threading.Event(), False
        self.succeeded = threading.Event()
        """Set once all that the other hosts had written has been here."""
        self._thread = threading.Thread(target=self._run, name="pull-events", daemon=True)
        self._thread.start()
        self._pulled.wait(FIRST_PULL_S)

    def _run(self) -> None:
        last = False
        while not last:
            last = self._ended.wait(self._every_s if self._pulled.is_set() else 0.0)
            try:
                pull(self._root, self._folder)
                self.succeeded.set()
                self._failing = False
            except Exception as error:  # tried again
                if not self._failing:
                    log.warning("%s: the events there cannot be read for now (%s)", self._root, error)
                self._failing = True
            self._pulled.set()

    def stop(self, wait_s: float) -> None:
        self._ended.set()
        self._thread.join(min(wait_s, LAST_PULL_S))


def _guarded(name: str, action: Callable[[], T]) -> T | None:
    """The action's result; None, and a warning, where it fails."""
    try:
        return action()
    except Exception as error:  # what watches a stage must not be able to end it
        log.warning("%s: %s: %s", name, type(error).__name__, error)
        return None
