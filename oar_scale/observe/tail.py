"""``oar tail``: the events of a run as lines, the last ones or as they come."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Iterator

from oar_scale.observe.events import Event, EventReader, stages_with_events
from oar_scale.observe.formatting import line
from oar_scale.observe.run_location import Place

POLL_S = 0.5
POLL_S3_S = 5.0


def tail(place: Place, count: int, kinds: list[str], follow: bool) -> Iterator[str]:
    """The last ``count`` events, of these kinds or (none given) of all; with ``follow``, then what is appended, without end."""
    readers: dict[str, EventReader] = {}
    yield from map(line, deque(_new(place, readers, kinds), maxlen=count))
    while follow:
        time.sleep(POLL_S3_S if place.root and place.root.startswith("s3://") else POLL_S)
        place.refresh()
        yield from map(line, _new(place, readers, kinds))


def _new(place: Place, readers: dict[str, EventReader], kinds: list[str]) -> Iterator[Event]:
    """What was appended to any stage, also to one that has begun since."""
    for stage in stages_with_events(place.events):
        readers.setdefault(stage, EventReader(place.events, stage))
    entries = heapq.merge(*(reader.poll() for reader in readers.values()), key=lambda entry: float(entry.event.get("time", 0.0)))
    return (entry.event for entry in itertools.chain(entries) if not kinds or entry.event["kind"] in kinds)
