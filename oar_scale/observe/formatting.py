"""Events as text for people: the console, ``oar tail``, ``oar status`` and the alerts use the same messages."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from oar_scale.observe.events import Event
from oar_scale.text import cut

if TYPE_CHECKING:
    from oar_scale.config.run_sections import AlertKind

ALERTS: dict[AlertKind, str] = {
    "failed": "failed",
    "driver_lost": "driver lost",
    "worker_failure": "worker failure",
    "restarts": "repeated restarts",
    "stall": "stall",
    "pending": "pending",
    "non_finite": "non-finite batch",
    "spike": "loss spike",
    "checkpoint_failed": "checkpoint failed",
    "rejected_checkpoint": "checkpoint rejected",
    "slow": "MFU drop",
    "data_wait": "waits for data",
    "straggler": "straggler",
}
"""What somebody should know of at once, and the title it is reported under: events of that kind, or what several of them say together
(``observe/alarms.py``)."""

SHOWN_ITEMS = 8
LONGEST = 300
"""Characters of a value of an event that a line shows."""


def message(event: Event) -> str | None:
    """The message of an event that is no measurement; None for measurements (``train``, ``pool``, ``vq``) and unknown kinds."""
    text = _message(event)
    return None if text is None else cut(text)


def _message(event: Event) -> str | None:
    match event["kind"]:
        case "heldout":
            others = [
                f"{name.removeprefix('nll_')} {number(event[name])}" for name in ("nll_raster", "nll_stored", "nll_ema") if name in event
            ]
            more = f"; {', '.join(others)}" if others else ""
            return f"{_at(event)}held-out NLL {number(event.get('nll_random'))} nats per code (random orders{more})"
        case "checkpoint":
            waited = f", waited {event['wait_s']:.1f} s" if event.get("wait_s", 0) >= 0.1 else ""
            upload = f", upload {event['upload_s']:.1f} s" if event.get("upload_s") else ""
            return f"{_at(event)}checkpoint, {event.get('bytes', 0) / 1e6:.1f} MB in {event.get('seconds', 0.0):.1f} s{waited}{upload}"
        case "checkpoint_failed":
            return f"{_at(event)}the checkpoint was not written: {event.get('fault')}"
        case "rejected_checkpoint":
            return f"passed over {event.get('uri')}: {event.get('fault')}"
        case "resumed":
            converted = (
                f", converted from {event.get('world_size')} workers, ZeRO {event.get('zero_stage')}" if event.get("converted") else ""
            )
            return f"{_at(event)}loaded {event.get('uri')}{converted} in {event.get('seconds', 0.0):.1f} s"
        case "settings_changed":
            changes = event.get("changes", {}).items()
            return f"{_at(event)}settings changed: " + ", ".join(f"{name} {each.get('was')} -> {each.get('is')}" for name, each in changes)
        case "non_finite":
            faults = " and ".join(f"{name} {_raw(event, name)}" for name in ("loss", "grad_norm") if name in event)
            return f"{_at(event)}batch skipped: {faults or 'not finite'} (samples {items(event.get('uids', []))})"
        case "bad_sample":
            return f"{_at(event)}sample {event.get('uid')} replaced: {event.get('fault')}"
        case "spike":
            then = "back to the last good checkpoint" if event.get("action") == "rollback" else "going on"
            return f"{_at(event)}loss {number(event.get('loss'))} where {number(event.get('expected'))} was expected; {then}"
        case "stopping":
            return f"{_at(event)}stopping: {event.get('reason')}"
        case "resized":
            return f"{event.get('from_workers')} -> {event.get('to_workers')} workers: {event.get('reason')}"
        case "worker_failure":
            return f"the workers failed: {event.get('cause')}"
        case "failed":
            again = "" if event.get("final", True) else "; its job starts it again"
            return f"the stage has ended: {event.get('cause')}{again}"
        case "samples":
            return f"{_at(event)}samples in {event.get('image')}"
        case "profile":
            return f"{_at(event)}profile in {event.get('trace')}"
        case "end":
            return f"finished in {duration(float(event.get('seconds', 0.0)))}"
    return None


def line(event: Event, show_day: bool = False) -> str:
    """An event as one line of a log: when, which stage, what."""
    when = datetime.fromtimestamp(float(event.get("time", 0.0))).strftime("%Y-%m-%d %H:%M:%S" if show_day else "%H:%M:%S")
    text = message(event)
    if text is None:
        hidden = ("time", "stage", "kind", "non_finite", "recipe", "versions")
        fields = {name: value for name, value in event.items() if name not in hidden} | event.get("non_finite", {})
        text = "  ".join(f"{name} {value_text(value)}" for name, value in fields.items())
    return f"{when}  {event.get('stage', '?'):9} {event['kind']:19} {text}".rstrip()


def value_text(value: object) -> str:
    """A value of an event, short."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.3e}"
    if isinstance(value, list):
        return f"[{items(value)}]"
    return "-" if value is None else cut(str(value), characters=LONGEST)


def items(values: Sequence[object]) -> str:
    """The first values of a list, and how many more there are."""
    more = f", and {len(values) - SHOWN_ITEMS} more" if len(values) > SHOWN_ITEMS else ""
    return ", ".join(value_text(value) for value in values[:SHOWN_ITEMS]) + more


def number(value: float | None) -> str:
    """A loss or likelihood; what JSON holds as null was not finite."""
    return "not finite" if value is None else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Seconds as text: ``9 s``, ``2 min 05 s``, ``1 h 20 min``, ``3 d 04 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def time_left(units: float, per_second: float | None) -> str:
    """``"1 min 20 s left"``; empty while the rate is not known, or when nothing is left."""
    return f"{duration(units / per_second)} left" if per_second and units > 0 else ""


def _at(event: Event) -> str:
    return f"step {event['step']}: " if "step" in event else ""


def _raw(event: Event, name: str) -> str:
    """A number of an event as text; where JSON could not hold it, what it was (``nan``, ``inf``)."""
    return str(event.get("non_finite", {}).get(name) or number(event[name]))
