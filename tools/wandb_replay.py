#!/usr/bin/env python3
"""Makes a clean W&B run of each stage from a run's event files, where W&B lost some, or was offline, or should be elsewhere.

    python tools/wandb_replay.py runs/emoji                         every stage, as new runs of the project oar_scale
    python tools/wandb_replay.py s3://bucket/emoji --stage pretrain --project review
    python tools/wandb_replay.py runs/emoji --offline               into runs/emoji/wandb/, for wandb sync

The runs hold the history as it counts: each step once, with the values of the last attempt, and no measurement that was
undone; faults and restarts are all there.
Without a key they are kept offline. The runs that were there before stay as they are.
"""

from __future__ import annotations

import argparse
import os
import sys
import uuid

from oar_scale.errors import UserError
from oar_scale.observe.events import EventReader, read_events, stages_with_events
from oar_scale.observe.projection import RowProjection, measured
from oar_scale.observe.run_location import find_run
from oar_scale.observe.wandb_run import Mode, WandbName, WandbRun, wanted_mode
from oar_scale.runtime.program import program

FINISH_S = 3600.0


def replay(run: str, stages: list[str], project: str, mode: Mode) -> None:
    """Send these stages of a run (none given: all) as new W&B runs.

    Raises:
        UserError: there is no such run or stage.
    """
    location = find_run(run)
    there = stages_with_events(location.events)
    missing = [stage for stage in stages if stage not in there]
    if missing:
        raise UserError(f"{run}: no events of {', '.join(missing)}; there are those of {', '.join(there)}")
    folder = os.getcwd() if run.startswith("s3://") else os.path.dirname(location.events)
    again = uuid.uuid4().hex[:8]
    for stage in stages or there:
        _replay_stage(location.events, folder, stage, again, project, mode)


def _replay_stage(events: str, folder: str, stage: str, again: str, project: str, mode: Mode) -> None:
    projection = RowProjection()
    points = [event for event in read_events(events, stage) if measured(event)]
    happened = [entry.event for entry in EventReader(events, stage).poll() if not measured(entry.event)]
    events_in_time = sorted(points + happened, key=lambda event: float(event["time"]))
    rows = [row for event in events_in_time if (row := projection.take(0, event)[0]) is not None]
    if not rows:
        return
    name = str(projection.config.get("name", os.path.basename(folder)))
    at_wandb = WandbName(project, f"{name}-{again}", f"{name}-{stage}", stage, f"{again}-{stage}", ("replayed",))
    run = WandbRun(folder, at_wandb, mode, projection.config, FINISH_S, pictures=os.path.dirname(events))
    for row in rows:
        run.log(row)
    run.finish(projection.complete)
    print(f"{stage}: {len(rows)} rows, {run.url or f'offline in {folder}/wandb'}")


def main() -> None:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("run", metavar="RUN", help="a run's folder, its recipe (.yaml), or its storage (s3://bucket/prefix)")
    parser.add_argument("--stage", action="append", default=[], help="only this stage; may be repeated")
    parser.add_argument("--project", default="oar_scale")
    parser.add_argument("--offline", action="store_true", help="write files for wandb sync")
    arguments = parser.parse_args()
    mode = wanted_mode("offline" if arguments.offline else "online", lambda level, text: print(text, file=sys.stderr))
    replay(arguments.run, arguments.stage, arguments.project, mode)


if __name__ == "__main__":
    program(main)
