"""The driver of a pool: hires actors, gives them shards, and looks after what is late, lost or somebody else's.

One loop, one thread; nothing it remembers is needed by the next driver:

    hire, assign, wait for outcomes, and now and then look at what other pools on the same ledger have done
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oar_scale.errors import Requeue, UserError
from oar_scale.runtime.retry import retry_transient
from oar_scale.runtime.stop_signals import StopSignals
from oar_scale.shard_pool.actor import Order, Outcome
from oar_scale.shard_pool.backends import Actors
from oar_scale.shard_pool.leases import Holder, Watch
from oar_scale.shard_pool.ledger import Entry, Facts, Ledger
from oar_scale.shard_pool.pool_types import ArrayTask, Bounds, OnEvent, OnProgress, PoolReport, Timing

REMEMBERED = 300
"""Shards whose seconds make the median."""
LONGEST_PAUSE_S = 600.0
"""Between tries to hire where workers cannot be made though others work."""


@dataclass
class _Task:
    """What an actor is doing: an order, or (None) making its worker."""

    order: Order | None
    since: float | None
    """None: it has no process yet, because there is no room for it."""


@dataclass
class Driver:
    ledger: Ledger
    missing: Sequence[str]
    bounds: Bounds
    max_retries: int
    timing: Timing
    report: PoolReport
    signals: StopSignals
    array: ArrayTask | None
    earlier_s: Sequence[float]
    """What the last shards took that earlier pools finished."""
    on_progress: OnProgress | None
    on_event: OnEvent | None

    def __post_init__(self) -> None:
        self.holder = Holder(self.ledger, self._describe, self.timing.beat_s, self.timing.patience_s)
        self.watch = Watch(self.ledger, self.timing.lease_s)
        self.open = dict.fromkeys(self.missing)
        """Shards that are neither done nor poison."""
        self.waiting: deque[tuple[str, int]] = deque()
        """Shards that nobody is at, and the number of the claim to get for each."""
        self.foreign: dict[str, float] = {}
        """Shards that another pool is at, and since when we know."""
        self.tasks: dict[int, _Task] = {}
        self.idle: list[int] = []
        self.hosts: dict[int, str] = {}
        self.born: dict[int, float] = {}
        self.failed_at: dict[str, set[str]] = {}
        self.seconds: deque[float] = deque(self.earlier_s, maxlen=REMEMBERED)
        self.ours = 0
        """Of these seconds, those of shards that this pool finished."""
        self.next_round = 0.0
        self.failed_starts = 0
        """Since the last worker that could be made."""
        self.pause_s, self.hire_again = self.timing.pause_s, 0.0
        self.next_look, self.spent_s = 0.0, 0.0
        self.said_waiting = False
        self.blind_since: float | None = None
        self.began = time.monotonic()

    # -- the loop -------------------------------------------------------------------------------------------------------

    def do(self, actors: Actors) -> None:
        self.actors = actors
        with self.holder:
            try:
                self._begin()
                while self.open:
                    if self.signals.reason:
                        self._drain(self.signals.reason)
                        raise Requeue(self.signals.reason)
                    self._hire()
                    self._assign()
                    for actor, outcome in self.actors.wait(min(1.0, self.timing.look_s)):
                        self._take(actor, outcome)
                    if time.monotonic() >= self.next_round:
                        self._replace_stuck()
                        self.next_round = time.monotonic() + min(1.0, self.timing.look_s)
                    if self.foreign and (self.idle or not self.tasks) and time.monotonic() >= self.next_look:
                        self._look()
                self._tidy()
            finally:
                self.actors.close()
                self.report.actor_seconds = self._actor_seconds()

    def _begin(self) -> None:
        """Who else is here, and who is at what?"""
        poison = retry_transient(self.ledger.poison, self.timing.patience_s)
        self.poison_before = {shard: record["holder"] for shard, record in poison.items()}
        retry_transient(self.watch.look, self.timing.patience_s)
        others = {holder: record for holder, record in self.watch.living().items() if holder != self.holder.id}
        for holder, record in others.items():
            if not (self.array and record.get("array")):
                self._say("helping", holder=holder, host=record["host"], pid=record["pid"])
        self.waiting.extend((shard, 0) for shard in self._own_order(bool(others)))
        self._look()

    def _own_order(self, others: bool) -> Sequence[str]:
        """All missing shards; several pools begin in several places."""
        if self.array:
            start = self.array.index * len(self.missing) // self.array.of
        else:
            start = hash(self.holder.id) % len(self.missing) if others else 0
        return [*self.missing[start:], *self.missing[:start]]

    def _say(self, kind: str, **fields: Any) -> None:
        if self.on_event:
            self.on_event(kind, fields)

    def _describe(self) -> Facts:
        """What our heartbeat says; called in its thread."""
        report = self.report
        return {
            "array": self.array is not None,
            "actors": report.actors,
            "actor_seconds": round(self._actor_seconds(), 1),
            "deaths": report.deaths,
            "retries": report.retries,
            "late": report.late,
        }

    # -- actors ---------------------------------------------------------------------------------------------------------

    def _hire(self) -> None:
        starting = sum(task.order is None for task in self.tasks.values())
        have, wanted = len(self.idle) + len(self.tasks), len(self.waiting) - len(self.idle) - starting
        count = min(wanted, self.bounds.most - have)
        if count > (sure := max(0, self.bounds.least - have)):
            # Some more than there is room for: a cluster that can grow does so for what is asked of it.
            count = min(count, max(sure, self.actors.room() - starting, max(1, len(self.hosts) // 2) - starting))
        for _ in range(count if time.monotonic() >= self.hire_again else 0):
            actor = self.actors.start()
            self.tasks[actor], self.born[actor] = _Task(None, None), time.monotonic()
        if not self.hosts and not self.said_waiting and time.monotonic() - self.began > 60:
            self.said_waiting = True
            self._say("waiting", seconds=60)

    def _dismiss(self, actor: int) -> None:
        self.actors.kill(actor)
        self.spent_s += time.monotonic() - self.born.pop(actor)
        if self.hosts.pop(actor, None) is not None and not self.hosts:
            self.failed_starts, self.hire_again = 0, 0.0  # whatever failed beside it: all rests on new ones now
        self.tasks.pop(actor, None)
        if actor in self.idle:
            self.idle.remove(actor)
        self.report.actors = len(self.hosts)

    def _lost(self, actor: int, error: str) -> None:
        """An actor that died or whose worker failed: whatever broke may have broken the process, too."""
        self.report.deaths += 1
        self._say("actor_lost", host=self.hosts.get(actor, ""), error=_first_line(error))
        self._dismiss(actor)

    def _actor_seconds(self) -> float:
        now = time.monotonic()
        return self.spent_s + sum(now - born for born in list(self.born.values()))

    # -- giving shards out ----------------------------------------------------------------------------------------------

    def _assign(self) -> None:
        while self.idle and (match := self._match()):
            actor, (shard, number) = match
            self.waiting.remove((shard, number))
            self._give(actor, shard, number)
        if not self.waiting:
            self._back_up()
            while len(self.idle) > 1 and len(self.hosts) > self.bounds.least:
                self._dismiss(self.idle[0])

    def _match(self) -> tuple[int, tuple[str, int]] | None:
        """The first waiting shard with an actor for it: not on a host where it failed, if there is another host."""
        hosts = set(self.hosts.values())
        for shard, number in self.waiting:
            shunned = self.failed_at.get(shard, set())
            usable = [actor for actor in self.idle if self.hosts[actor] not in shunned or hosts <= shunned]
            if usable:
                return usable[-1], (shard, number)
        return None

    def _give(self, actor: int, shard: str, number: int) -> None:
        self.idle.remove(actor)
        order = Order(shard, self.report.failures.get(shard, 0) + 1, number)
        self.tasks[actor] = _Task(order, time.monotonic())
        self.actors.run(actor, order)

    def _back_up(self) -> None:
        """Give what is late to an idle actor as well, of another host if there is one."""
        at: dict[str, list[tuple[int, _Task, Order]]] = {}
        for actor, task in self.tasks.items():
            if task.order and task.order.shard in self.open:
                at.setdefault(task.order.shard, []).append((actor, task, task.order))
        for shard, working in at.items():
            actor, task, order = working[0]
            seconds = time.monotonic() - (task.since or 0)
            if self.idle and len(working) == 1 and self._late(seconds):
                self._say_late(shard, seconds)
                elsewhere = [other for other in self.idle if self.hosts[other] != self.hosts[actor]]
                self._give((elsewhere or self.idle)[-1], shard, order.claim)

    def _late(self, seconds: float) -> bool:
        return len(self.seconds) >= 3 and seconds > max(self.timing.late_s, self.timing.late * statistics.median(self.seconds))

    def _say_late(self, shard: str, seconds: float) -> None:
        self.report.late += 1
        self._say("late", shard=shard, seconds=seconds, median_s=statistics.median(self.seconds))

    def _replace_stuck(self) -> None:
        timing, median = self.timing, statistics.median(self.seconds or [0.0])
        # What earlier pools took may have been other hardware's: it can lengthen the wait for a first shard, not shorten it.
        shard_s = max(timing.stuck_s if self.ours >= 3 else timing.hang_s, timing.stuck * median)
        for actor, task in list(self.tasks.items()):
            limit = (shard_s if task.order else timing.hang_s) + timing.patience_s
            if task.since is not None and time.monotonic() - task.since > limit:
                self._take(actor, Outcome("failed", error=f"no answer in {limit:.0f} s"))

    # -- taking outcomes ------------------------------------------------------------------------------------------------

    def _take(self, actor: int, outcome: Outcome) -> None:
        if outcome.kind == "placed":
            if actor in self.tasks:
                self.tasks[actor].since = time.monotonic()
            return
        task, host = self.tasks.pop(actor, None), self.hosts.get(actor, "")
        starting = task is not None and task.order is None
        if outcome.kind == "failed" or (starting and outcome.kind != "started"):
            self._lost(actor, outcome.error)
        else:
            self.idle.append(actor)
        if starting:
            self._started(actor, outcome)
        elif task is not None and task.order is not None and task.order.shard in self.open:
            self._ended(task.order, outcome, host)

    def _started(self, actor: int, outcome: Outcome) -> None:
        if outcome.kind == "started":
            self.failed_starts, self.pause_s = 0, self.timing.pause_s
            self.hosts[actor] = outcome.work["host"]
            self.report.actors = len(self.hosts)
            self.report.most_actors = max(self.report.most_actors, len(self.hosts))
            self._say("actor_started", **outcome.work)
        else:
            self._not_started(outcome)

    def _not_started(self, outcome: Outcome) -> None:
        """One host may be broken, or lack what the others have: that stops nobody who works, or who may in a moment."""
        self.failed_starts += 1
        user_error, tried = outcome.kind == "user error", self.failed_starts
        if not user_error and tried <= self.max_retries:
            return
        if not self.hosts and not any(task.order is None and task.since is not None for task in self.tasks.values()):
            if user_error:
                raise UserError(outcome.error)
            raise RuntimeError(f"no worker could be made in {tried} tries; the last error:\n{outcome.error}")
        if time.monotonic() >= self.hire_again:
            self._say("not_hiring", seconds=self.pause_s, error=_first_line(outcome.error))
            self.hire_again, self.pause_s = time.monotonic() + self.pause_s, min(2 * self.pause_s, LONGEST_PAUSE_S)

    def _ended(self, order: Order, outcome: Outcome, host: str) -> None:
        shard = order.shard
        if outcome.kind == "done":
            self._settle(shard, Entry(outcome.facts, outcome.work))
        elif outcome.kind == "taken":
            self.foreign[shard] = time.monotonic()
        elif outcome.kind == "user error":
            self._set_aside(shard, outcome.error)
        else:
            self.report.failures[shard] = tries = self.report.failures.get(shard, 0) + 1
            self.failed_at.setdefault(shard, set()).add(host)
            if any(task.order and task.order.shard == shard for task in self.tasks.values()):
                return  # another actor is at it as well
            if tries > self.max_retries:
                self._set_aside(shard, outcome.error)
                return
            self._say("retry", shard=shard, attempt=tries + 1, error=_first_line(outcome.error))
            self.waiting.append((shard, order.claim))

    def _settle(self, shard: str, entry: Entry) -> None:
        del self.open[shard]
        self.report.done[shard] = entry.facts
        if entry.work.get("holder") == self.holder.id:
            self.seconds.append(entry.work["seconds"])
            self.ours += 1
        else:
            self.report.elsewhere += 1
        if shard in self.poison_before:
            retry_transient(lambda: self.ledger.readmit(shard), self.timing.patience_s)
        if self.on_progress:
            self.on_progress(shard, entry.facts, self.report)

    def _set_aside(self, shard: str, error: str) -> None:
        del self.open[shard]
        self.report.poison[shard] = error
        retry_transient(lambda: self.ledger.set_aside(shard, error, self.holder.id), self.timing.patience_s)
        self._say("poison", shard=shard, error=_first_line(error))

    # -- other pools ----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """See what others have done, are at, have given up, or have left behind."""
        began = time.monotonic()
        try:
            self._look_once()
            self.blind_since = None
        except Exception as error:  # a storage that refuses now may answer at the next look; it is said, and not for ever
            self.blind_since = self.blind_since or began
            if time.monotonic() - self.blind_since > self.timing.patience_s:
                raise
            self._say("storage", error=f"{type(error).__name__}: {_first_line(str(error))}")
        self.next_look = time.monotonic() + max(self.timing.look_s, 20 * (time.monotonic() - began))

    def _look_once(self) -> None:
        claims = self.ledger.claims()  # before the entries: a claim is released after its entry is written
        waiting, foreign = dict(self.waiting), self.foreign
        entries = self.ledger.entries([*waiting, *foreign])
        poison = self.ledger.poison()
        self.watch.look()
        self.waiting, self.foreign = deque(), {}
        for shard in (*waiting, *foreign):
            claim, since = claims.get(shard), foreign.get(shard, time.monotonic())
            if shard not in self.open:
                continue
            if shard in entries:
                self._settle(shard, entries[shard])
            elif shard in poison and poison[shard]["holder"] != self.poison_before.get(shard):
                del self.open[shard]
                self.report.poison[shard] = poison[shard]["error"]
            elif claim is None or claim.holder == self.holder.id or waiting.get(shard, 0) > claim.number:
                self.waiting.append((shard, waiting.get(shard, 0)))
            elif (gone := self.watch.gone(claim.holder)) or (self.idle and self._late(time.monotonic() - since)):
                if gone:
                    self._say("taken_over", shard=shard, holder=claim.holder)
                else:
                    self._say_late(shard, time.monotonic() - since)
                self.waiting.append((shard, claim.number + 1))
            else:
                self.foreign[shard] = since

    def _tidy(self) -> None:
        """Remove the claims of those who died between entering a shard and releasing it. They harm nobody: all is done already."""
        try:
            for claim in self.ledger.claims().values():
                if claim.shard in self.report.done:
                    self.ledger.release(claim)
        except UserError as error:
            self._say("storage", error=_first_line(str(error)))

    # -- being stopped --------------------------------------------------------------------------------------------------

    def _drain(self, reason: str) -> None:
        """Let running shards end if they do so in time; what is claimed beyond that goes back as the holder leaves."""
        running = sum(task.order is not None for task in self.tasks.values())
        self._say("draining", reason=reason, running=running, grace_s=self.timing.grace_s)
        end, before = time.monotonic() + self.timing.grace_s, len(self.report.done)
        for actor in [*self.idle, *(actor for actor, task in self.tasks.items() if task.order is None)]:
            self._dismiss(actor)
        while self.tasks and (left := end - time.monotonic()) > 0:
            for actor, outcome in self.actors.wait(min(1.0, left)):
                self._take(actor, outcome)
                if actor in self.born:
                    self._dismiss(actor)
        self._say("drained", finished=len(self.report.done) - before, handed_back=len(self.tasks))


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]
