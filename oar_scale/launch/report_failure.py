"""What a job says when it gives up: ``python -m oar_scale.launch.report_failure RECIPE WHY SINCE [STAGE ...]``.

A driver reports its own failure (:mod:`oar_scale.observe.failure`). One that was killed cannot, nor can one that never began: because a
node was lost, memory ran out, or Ray did not come up. The shell around it (``job.sbatch.j2``) or the Ray job's entry (``ray_entry.py``)
still lives, and does it instead, once nothing will start the driver again.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from oar_scale.config.loading import load_recipe
from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError
from oar_scale.observe.events import Event, EventReader, stages_with_events
from oar_scale.observe.failure import report_failure
from oar_scale.observe.run_location import RunLocation
from oar_scale.observe.watch import catch_up

log = logging.getLogger(__name__)


def report(recipe: Recipe, why: str, since: float, stages: Sequence[str] = ()) -> None:
    """Record that a job has given up, unless its driver has said so itself. Never raises.

    Args:
        why: what the job says.
        since: Unix time at which its last attempt began.
        stages: what the job does; none: all stages of the recipe.
    """
    try:
        events = os.path.join(os.path.abspath(recipe.local_dir), "events")
        location = RunLocation(recipe.name, events, recipe.root)
        try:
            location.refresh()
            finished = set(location.finished())
        except Exception as error:  # a storage that is away may be why it has failed
            log.warning("%s: %s", recipe.root, error)
            finished = set()
        if any(event.get("final") and event["time"] >= since for event in _last_failures(events)):
            return
        names = [*stages] or [stage.name for stage in recipe.stages()]
        stage = next((name for name in names if name not in finished), names[-1])
        report_failure(events, stage, recipe, recipe.root, why, final=True)
        catch_up(events, recipe, recipe.root, [stage], lambda text: None)
    except Exception as error:  # it must not change how the job ends
        log.warning("the failure could not be reported: %s: %s", type(error).__name__, error)


def _last_failures(events: str) -> list[Event]:
    """The newest event ``failed`` of each stage."""
    newest: list[Event] = []
    for stage in stages_with_events(events):
        newest += [entry.event for entry in EventReader(events, stage).poll() if entry.event["kind"] == "failed"][-1:]
    return newest


def main() -> int:
    """Report for the job that calls; the exit code is 0 whatever comes of it."""
    recipe, why, since, *stages = sys.argv[1:]
    try:
        report(load_recipe(recipe), why, float(since), stages)
    except UserError as error:  # the recipe may be the fault
        print(f"the failure could not be reported: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
