"""``oar tail``: the events of a run as lines, the last ones or as they come."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Iterator

from oar_scale.observe.events import Event, EventReader, stages_with_events
from oar_scale.observe.formatting import line
from oar_scale.observe.run_location import RunLocation

POLL_S = 0.5
POLL_S3_S = 5.0


def tail(location: RunLocation, count: int, kinds: list[str], follow: bool) -> Iterator[str]:
    """The last ``count`` events, of these kinds or (none given) of all; with ``follow``, then what is appended, without end."""
    readers: dict[str, EventReader] = {}
    yield from map(line, deque(_new(location, readers, kinds), maxlen=count))
    while follow:
        time.sleep(POLL_S3_S if location.root and location.root.startswith("s3://") else POLL_S)
        location.refresh()
        yield from map(line, _new(location, readers, kinds))


def _new(location: RunLocation, readers: dict[str, EventReader], kinds: list[str]) -> Iterator[Event]:
    """The events that were appended to any stage, also to one that has begun since."""
    for stage in stages_with_events(location.events):
        readers.setdefault(stage, EventReader(location.events, stage))
    entries = heapq.merge(*(reader.poll() for reader in readers.values()), key=lambda entry: float(entry.event.get("time", 0.0)))
    return (entry.event for entry in itertools.chain(entries) if not kinds or entry.event["kind"] in kinds)
