"""``oar status``: one screen about a run, from its events alone. For the engineer on call.

emoji (runs/emoji)
data       done in 12 s
pretrain   running  step 1240 of 5000 (25 %)  1 h 02 min left  last progress 3 s ago
           61.3 images/s (median 60.9, 101 % of it; plan 64.0, 96 %)  mfu 0.31  data wait 0.4 %
           loss 3.214  held-out NLL 3.402 at step 1200
           checkpoint of step 1200, committed 2 min 05 s ago
           4 workers, ZeRO 2, attempt 2 (1 restart)  skipped batches 0  bad samples 3  storage retries 1
           alert 10:31:07 spike: step 900: loss 5.210 where 3.300 was expected; going on
"""

from __future__ import annotations

import time

from oar_scale.observe.alarms import STRAGGLES
from oar_scale.observe.events import EventReader, stages_with_events
from oar_scale.observe.formatting import ALERTS, duration, line, message, number
from oar_scale.observe.run_location import FinishedStage, RunLocation
from oar_scale.observe.state import StageState
from oar_scale.registry import STAGES, kind_of

DEFAULT_STALL_S = 600.0


def status(location: RunLocation, now: float | None = None) -> str:
    """The screen."""
    now = time.time() if now is None else now
    finished, lines = location.finished(), [location.name]
    stages = {*finished, *stages_with_events(location.events)}
    width = max([10, *map(len, stages)])
    for stage in sorted(stages, key=_place):
        state = StageState(stage)
        state.read(EventReader(location.events, stage))
        headline = _done_line(finished[stage]) if stage in finished and not _continued(state) else _status_line(state, now)
        lines += [f"{stage if index == 0 else '':{width}} {text}" for index, text in enumerate([headline, *_details(state, now)])]
    return "\n".join(lines) + "\n"


def _place(stage: str) -> tuple[int, int, str]:
    """Where a stage stands on the screen: arms and seeds after the stage that they are of, seed by seed."""
    order, (_, _, seed) = list(STAGES), stage.partition(".s")
    return order.index(kind_of(stage)), int(seed) if seed.isdecimal() else 0, "" if stage in STAGES else stage


def _done_line(stage: FinishedStage) -> str:
    stale = f"  STALE: {stage.stale} has been done again or continued since" if stage.stale else ""
    return f"done in {duration(stage.seconds)}{stale}"


def _continued(state: StageState) -> bool:
    """Whether a training that was finished has begun again, to take more steps."""
    training = bool(STAGES[kind_of(state.stage)].training)
    return training and state.status not in ("waiting", "done")


def _status_line(state: StageState, now: float) -> str:
    """The status line of an unfinished stage: its state, its progress, and since when."""
    silent = now - (state.progressed or state.began or now)
    status: str = state.status
    if status not in ("done", "waiting") and silent > _stall_s(state) and not state.has_said_its_end:
        status = f"STALLED, or ended without an event, while {status}:"
    texts = [status, _progress(state)]
    left = state.seconds_left()
    if state.status == "running" and left is not None and silent <= _stall_s(state):
        texts.append(f"{duration(left)} left")
    if state.has_said_its_end and not state.latest["failed"].get("final"):
        texts.append("its job starts it again")
    if state.status != "done":
        texts.append(f"last progress {duration(silent)} ago")
    return "  ".join(part for part in texts if part)


def _progress(state: StageState) -> str:
    if state.step is None:
        return ""
    return f"step {state.step}" + (f" of {state.steps} ({state.step / state.steps:.0%})" if state.steps else "")


def _details(state: StageState, now: float) -> list[str]:
    lines = [_speed(state), _quality(state), _checkpoint(state, now), _history(state), _changes(state)]
    lines += [f"alert {_alert(state, index)}" for index in range(len(state.alerts))]
    more = sum(state.totals[kind] for kind in ALERTS) - len(state.alerts)
    if more:
        lines.append(f"and {more} alerts before (oar tail)")
    return [text for text in lines if text]


def _speed(state: StageState) -> str:
    speed, median = state.value("train", "images_per_s"), state.median_images_per_s
    if speed is None or not median:
        return ""
    plan = state.value("start", "planned_images_per_s")
    against = f"median {median:.1f}, {speed / median:.0%} of it" + (f"; plan {plan:.1f}, {speed / plan:.0%}" if plan else "")
    texts = [f"{speed:.1f} images/s ({against})"]
    mfu, step_s, wait_s = (state.value("train", name) for name in ("mfu", "step_s", "data_wait_s"))
    if mfu is not None:
        texts.append(f"mfu {mfu:.2f}")
    if step_s and wait_s is not None:
        texts.append(f"data wait {wait_s / step_s:.1%}")
    signs = state.signs
    if signs.slowest is not None and signs.straggling is not None and signs.straggling > STRAGGLES:
        texts.append(f"slowest rank {signs.slowest[0]} on {signs.slowest[1]}, {signs.straggling:.2f} times the median rank")
    return "  ".join(texts)


def _quality(state: StageState) -> str:
    texts = [f"loss {number(state.value(kind, 'loss'))}" for kind in ("train", "vq") if kind in state.latest]
    if "heldout" in state.latest:
        heldout = state.latest["heldout"]
        texts.append(f"held-out NLL {number(heldout.get('nll_random'))} at step {heldout['step']}")
    return "  ".join(texts)


def _checkpoint(state: StageState, now: float) -> str:
    checkpoint = state.latest.get("checkpoint")
    if checkpoint is None:
        return "no checkpoint yet" if "train" in state.latest else ""
    return f"checkpoint of step {checkpoint['step']}, committed {duration(max(0.0, now - checkpoint['time']))} ago"


def _history(state: StageState) -> str:
    """Workers, restarts and what went wrong so far."""
    start = state.latest.get("start")
    if start is None:
        return ""
    restarts = state.attempts - 1
    size = start.get("world_size")
    workers = [] if size is None else [f"{size} worker{'s' if size != 1 else ''}"]
    zero = [f"ZeRO {start['zero_stage']}"] if "zero_stage" in start else []
    attempt = f"attempt {state.attempts} ({restarts} restart{'s' if restarts != 1 else ''})"
    counts = "  ".join(
        f"{name.replace('_', ' ')} {int(state.totals[name])}" for name in ("skipped_batches", "bad_samples", "storage_retries")
    )
    return f"{', '.join([*workers, *zero, attempt])}  {counts}"


def _changes(state: StageState) -> str:
    """The last change of settings."""
    return (message(state.latest["settings_changed"]) or "") if "settings_changed" in state.latest else ""


def _alert(state: StageState, index: int) -> str:
    when, _, _, *rest = line(state.alerts[index]).split(maxsplit=3)
    return f"{when} {ALERTS[state.alerts[index]['kind']]}: {rest[0] if rest else ''}"


def _stall_s(state: StageState) -> float:
    """``observe.stall_s`` of the run, as its last start has it."""
    recipe = state.latest.get("start", {}).get("recipe", {})
    return float(recipe.get("observe", {}).get("stall_s", DEFAULT_STALL_S))
