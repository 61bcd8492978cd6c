"""One run at W&B, as its client library offers it: opened, given rows, closed. Slow, and allowed to fail.

Only the process that :mod:`oar_scale.observe.wandb_process` starts, and the replay tool, come here: nothing of wandb is
ever loaded into a process that trains. The environment's WANDB_API_KEY, WANDB_BASE_URL and WANDB_ENTITY count as usual.
"""

from __future__ import annotations

import contextlib
import http.client
import netrc
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

from oar_scale.observe.projection import WandbRow
from oar_scale.redaction import redact

Mode = Literal["offline", "online"]
AlertLevel = Literal["WARN", "ERROR"]
Say = Callable[[str, str], None]
"""A level (``info``, ``warning``) and a line."""

PROBE_S = 4.0
"""Silence of the W&B server that counts as no server."""
INIT_S = 20.0


@dataclass(frozen=True)
class WandbName:
    """The names of a stage's run at W&B."""

    project: str
    group: str
    name: str
    job_type: str
    id: str
    tags: tuple[str, ...] = ()


class NotConfirmed(Exception):
    """W&B has not confirmed in time that it has everything."""


class WandbRun:
    """An open run.

    Attributes:
        first: the number of the first row that W&B does not have yet.
        online: whether rows go to the server, not only to a file.
    """

    def __init__(
        self, folder: str, name: WandbName, mode: Mode, config: Mapping[str, object], finish_s: float, pictures: str | None = None
    ) -> None:
        """Open it.

        Args:
            folder: W&B's files go into ``wandb/`` there.
            finish_s: how long :meth:`finish` waits.
            pictures: what the paths of pictures are relative to. Default: ``folder``.

        Raises:
            wandb.Error: the server refuses, or does not answer in time.
        """
        import wandb

        self._folder, self._pictures, self.name, self.online = folder, pictures or folder, name, mode == "online"
        settings = wandb.Settings(
            init_timeout=INIT_S,
            finish_timeout=finish_s,
            finish_timeout_raises=True,
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,  # the start event names the code
            x_disable_meta=True,  # arguments and machine of the process that only forwards
            x_disable_stats=True,
            x_save_requirements=False,
        )
        try:
            self._run = wandb.init(
                project=name.project,
                group=name.group,
                name=name.name,
                job_type=name.job_type,
                tags=list(name.tags),
                id=name.id,
                resume="allow",
                mode=mode,
                dir=folder,
                config=dict(config),
                settings=settings,
            )
        except Exception:
            start_over()  # a failed start still holds the run's id
            raise
        self.first = int(self._run.starting_step)
        self._drawn: set[str] = set()

    @property
    def url(self) -> str | None:
        """Address of the run's page; None offline."""
        return self._run.url if self.online else None

    def log(self, row: WandbRow) -> None:
        """Send a row, unless W&B has it."""
        if row.number < self.first:
            return
        self._draw_over(row.axis, row.kind)
        values: dict[str, object] = {**row.values, "_timestamp": row.time}
        if row.pictures:
            import wandb

            for key, path in row.pictures.items():
                full = os.path.join(self._pictures, path)
                if os.path.exists(full):
                    values[key] = wandb.Image(full, caption=row.captions if key == "samples/image" else None)
        self._run.log(values, step=row.number, commit=True)

    def _draw_over(self, axis: str, kind: str) -> None:
        if kind not in self._drawn:
            self._drawn.add(kind)
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(f"{kind}/*", step_metric=axis)
            if kind == "heldout":
                self._run.define_metric("heldout/nll_random", step_metric=axis, summary="min,last")

    def configure(self, config: Mapping[str, object]) -> None:
        """Set the configuration; a resumed run may have changed in it."""
        self._run.config.update(dict(config), allow_val_change=True)  # type: ignore[no-untyped-call]

    def alert(self, title: str, text: str, level: AlertLevel) -> None:
        """Send an alert to the users who have subscribed to them at W&B."""
        self._run.alert(title, text, level=level, wait_duration=60)

    def add_model(self, uri: str, metadata: Mapping[str, object]) -> None:
        """Log an exported model as an artifact: a local file by its bytes, an object in S3 by its name."""
        import wandb

        artifact = wandb.Artifact(f"{self.name.group}-{self.name.job_type}", type="model", metadata=dict(metadata))
        if uri.startswith("s3://"):
            artifact.add_reference(uri, checksum=False)
        else:
            artifact.add_file(uri, policy="immutable")  # it is not copied first
        self._run.log_artifact(artifact)

    def finish(self, complete: bool) -> None:
        """Wait until W&B has everything.

        Raises:
            NotConfirmed: it takes longer than ``finish_s``.
        """
        written = Path(self._run.dir).parent
        try:
            self._run.finish(exit_code=0 if complete else 1)
        except TimeoutError as error:
            raise NotConfirmed from error
        # A run offline is written from its first row each time, so that the newest file alone is the whole of it.
        for older in Path(self._folder, "wandb").glob(f"offline-run-*-{self.name.id}"):
            if older.name != written.name:
                shutil.rmtree(older, ignore_errors=True)


def wanted_mode(wanted: Mode, say: Say) -> Mode:
    """``wanted``; or ``offline``, with a warning, where there is no key."""
    if wanted == "online" and not has_key(_base_url()):
        say("warning", "W&B: no WANDB_API_KEY and none in ~/.netrc; the run is kept offline (wandb sync uploads it later)")
        return "offline"
    return wanted


def reachable_mode(wanted: Mode, say: Say) -> Mode:
    """``wanted``; or ``offline``, with a warning, where the server does not answer."""
    if wanted == "offline":
        return wanted
    try:
        urllib.request.urlopen(_base_url(), timeout=PROBE_S).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except (OSError, http.client.HTTPException) as error:
        say("warning", f"W&B: no answer from {redact(_base_url())} ({redact(str(error))}); the run is kept offline meanwhile")
        return "offline"
    return wanted


def start_over() -> None:
    """Drop what is left of a run, and wait until wandb's own server has ended."""
    if "wandb" in sys.modules:
        with contextlib.suppress(Exception):  # it may be the broken part itself
            sys.modules["wandb"].teardown()


def _base_url() -> str:
    import wandb

    return str(wandb.setup().settings.base_url)


def has_key(base_url: str) -> bool:
    """Whether there is a key for a W&B server, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlparse(base_url).hostname or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
