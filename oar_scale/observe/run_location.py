"""Where a run's events are, for commands that only look: its folder, its S3 prefix, or its recipe."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from dataclasses import dataclass
from typing import NamedTuple

from oar_scale.errors import DamagedJson, UserError
from oar_scale.observe.events import stages_with_events
from oar_scale.storage import Missing, join, open_storage, read_json


class FinishedStage(NamedTuple):
    """A stage that has been finished."""

    seconds: float
    stale: str | None
    """The stage that has been done again or continued since, though this one needs it."""


@dataclass
class RunLocation:
    """The location of a run's events and finished stages, as seen from this machine."""

    name: str
    """As the user gave it."""
    events: str
    """Local folder of its events."""
    root: str | None
    """Its storage, where the user gave that or it is local."""

    def refresh(self) -> None:
        """Bring what is new in the mirror; nothing to do for a local run."""
        if self.root is not None and self.root.startswith("s3://"):
            from oar_scale.observe.mirror import pull

            pull(self.root, self.events)

    def finished(self) -> dict[str, FinishedStage]:
        """The stages that have been finished."""
        finished: dict[str, FinishedStage] = {}
        for folder in dict.fromkeys(join(each, "stages") for each in (self.root, os.path.dirname(self.events)) if each):
            for uri in open_storage(folder).list(folder):
                if uri.endswith(".json"):
                    marker = read_json(uri)
                    try:
                        finished[str(marker["stage"])] = FinishedStage(float(marker["seconds"]), marker.get("stale"))
                    except (KeyError, TypeError, ValueError) as error:
                        raise DamagedJson(uri, f"{error!r}") from error
        return finished


def find_run(run: str) -> RunLocation:
    """Find the events of a run; those of a run in S3 are copied to a temporary folder.

    Args:
        run: a run's folder, ``s3://bucket/prefix``, or a recipe (``.yaml``).

    Raises:
        UserError: there is no run.
    """
    if run.startswith("s3://"):
        location = RunLocation(run, _scratch(), run)
    elif run.endswith((".yaml", ".yml")):
        from oar_scale.config.loading import load_recipe

        recipe = load_recipe(run)
        location = RunLocation(
            f"{recipe.name} ({recipe.local_dir})", os.path.join(os.path.abspath(recipe.local_dir), "events"), recipe.root
        )
    else:
        location = RunLocation(run, os.path.join(os.path.abspath(run), "events"), _local_root(run))
    location.refresh()
    if not stages_with_events(location.events) and not location.finished():
        raise UserError(
            f"{run}: no run here, or it has not begun: there are neither events nor finished stages.\n"
            "Give the folder of a run (runs/NAME), its recipe, or its storage (s3://bucket/prefix)."
        )
    return location


def _local_root(folder: str) -> str:
    """The storage of a run by its folder; an S3 storage is not queried, so that this works without a network."""
    try:
        root = read_json(join(folder, "run.json")).get("storage_root")
    except Missing:
        root = None
    return root if root and not root.startswith("s3://") else folder


def _scratch() -> str:
    """A folder that is gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="oar-events-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return os.path.join(folder, "events")
