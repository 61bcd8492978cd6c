"""The driver of a pool: starts actors, assigns shards, and handles stragglers, lost actors and other pools on the same ledger.

One loop, one thread. Whatever the driver remembers is in the ledger or can be lost: the next driver needs none of it.

    start actors -> assign shards -> wait for outcomes -> replace stuck actors -> poll what other pools have done
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oar_scale.errors import Requeue, UserError, first_line
from oar_scale.runtime.retry import retry_transient
from oar_scale.runtime.stop_signals import StopSignals
from oar_scale.shard_pool.actor import ActorOutcome, ShardTask
from oar_scale.shard_pool.actor_set import ActorSet
from oar_scale.shard_pool.backends import ActorBackend
from oar_scale.shard_pool.host_health import HostHealth
from oar_scale.shard_pool.leases import Lease, LeaseWatch
from oar_scale.shard_pool.ledger import Ledger, LedgerEntry, Record
from oar_scale.shard_pool.pool_types import ArrayTask, Bounds, OnEvent, OnProgress, PoolReport, Timing
from oar_scale.shard_pool.shard_times import ShardTimes


@dataclass
class PoolDriver:
    """Does all ``missing`` shards, or fails, or is stopped. Made for one call of :meth:`run`."""

    ledger: Ledger
    missing: Sequence[str]
    bounds: Bounds
    max_retries: int
    timing: Timing
    report: PoolReport
    signals: StopSignals
    array: ArrayTask | None = None
    earlier_s: Sequence[float] = ()
    """What the last shards took that earlier pools finished."""
    on_progress: OnProgress | None = None
    on_event: OnEvent | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.lease = Lease(self.ledger, self._describe, self.timing.heartbeat_s, self.timing.patience_s)
        self.watch = LeaseWatch(self.ledger, self.timing.lease_s, self.clock)
        # Shards. `unfinished` are all that are neither done nor poison; each is pending, with a busy actor of ours, or foreign.
        self.unfinished = dict.fromkeys(self.missing)
        self.pending: deque[tuple[str, int]] = deque()
        """Shards that nobody does, and the number of the claim to get for each."""
        self.foreign: dict[str, float] = {}
        """Shards that another pool has claimed, and since when we know."""
        self.health = HostHealth()
        self.times = ShardTimes(self.timing, self.earlier_s)
        # Polls.
        self.next_stuck_check = self.next_poll = 0.0
        self.unreadable_since: float | None = None
        """Since when the storage could not be polled."""

    # -- the loop -------------------------------------------------------------------------------------------------------

    def run(self, actors: ActorBackend) -> None:
        """Do what is missing; results are in ``report``.

        Raises:
            UserError, RuntimeError: nobody works, and no worker can be made; or all fails on this host of a job array.
            Requeue: stopped by a signal.
        """
        self.actors = ActorSet(actors, self.bounds, self.timing, self.max_retries, self.report, self._emit, self.clock)
        interval_s = min(1.0, self.timing.poll_s)
        with self.lease:
            try:
                self._begin()
                while self.unfinished:
                    if self.signals.reason:
                        raise Requeue(self.signals.reason, unfinished=self._drain(self.signals.reason))
                    self.actors.start_for(len(self.pending))
                    self._assign_shards()
                    for actor, outcome in actors.wait(interval_s):
                        self._handle(actor, outcome)
                    if self.clock() >= self.next_stuck_check:
                        self._replace_stuck_actors()
                        self.next_stuck_check = self.clock() + interval_s
                    if self.foreign and (self.actors.idle or not self.actors.busy) and self.clock() >= self.next_poll:
                        self._poll_other_pools()
                self._remove_stale_records()
            finally:
                actors.close()
                self.report.actor_seconds = self.actors.seconds()

    def _begin(self) -> None:
        """Find out which other pools there are, and which shards they do."""
        poison = retry_transient(self.ledger.poison, self.timing.patience_s)
        self.poison_before = {shard: record["holder"] for shard, record in poison.items()}
        retry_transient(self.watch.poll, self.timing.patience_s)
        others = {holder: record for holder, record in self.watch.alive().items() if holder != self.lease.holder}
        for holder, record in others.items():
            if not (self.array and record.get("array")):  # the other tasks of an array are no mistake
                self._emit("helping", holder=holder, host=record["host"], pid=record["pid"])
        # Pools begin at different positions of the list, so that they seldom claim the same shard.
        start = hash(self.lease.holder) % len(self.missing) if others else 0
        if self.array:
            start = self.array.index * len(self.missing) // self.array.of
        self.pending.extend((shard, 0) for shard in [*self.missing[start:], *self.missing[:start]])
        self._poll_other_pools()

    def _emit(self, kind: str, /, **fields: object) -> None:
        if self.on_event:
            self.on_event(kind, fields)

    def _describe(self) -> Record:
        """The fields that our heartbeat records; called in its thread."""
        report = self.report
        return {
            "array": self.array is not None,
            "actors": report.actors,
            "actor_seconds": round(self.actors.seconds(), 1),
            "deaths": report.deaths,
            "retries": report.retries,
            "late": report.stragglers,
        }

    # -- assigning shards -----------------------------------------------------------------------------------------------

    def _assign_shards(self) -> None:
        # Those that waited for actors on another host, and none came.
        settled = {shard: error for shard in self.health.suspected if shard in self.unfinished and (error := self._settled(shard))}
        for shard, claim in [item for item in self.pending if item[0] in settled] if settled else ():
            self.pending.remove((shard, claim))
            self._mark_poison(shard, settled[shard])
        while self.actors.idle and (match := self._match()):
            actor, (shard, claim) = match
            self.pending.remove((shard, claim))
            self._assign(actor, shard, claim)
        if not self.pending:
            self._duplicate_stragglers()
            while len(self.actors.idle) > 1 and len(self.actors.hosts) > self.bounds.least:
                self.actors.stop(self.actors.idle[0])

    def _match(self) -> tuple[int, tuple[str, int]] | None:
        """The first pending shard with an idle actor for it: not on a host where it failed, if there is another one."""
        hosts = set(self.actors.hosts.values())
        for shard, claim in self.pending:
            if usable := self.actors.idle_for(self.health.avoided(shard, hosts)):
                return usable[-1], (shard, claim)
        return None

    def _assign(self, actor: int, shard: str, claim: int) -> None:
        self.actors.assign(actor, ShardTask(shard, self.report.failures.get(shard, 0) + 1, claim))

    def _duplicate_stragglers(self) -> None:
        """Give stragglers that one actor does to an idle actor as well, of another host if there is one."""
        actors = self.actors
        by_shard: dict[str, list[tuple[int, ShardTask, float]]] = {}
        for actor, assignment in actors.busy.items():
            if assignment.task and assignment.task.shard in self.unfinished:
                by_shard.setdefault(assignment.task.shard, []).append((actor, assignment.task, assignment.since or 0))
        for shard, (first, *others) in by_shard.items():
            actor, task, since = first
            seconds = self.clock() - since
            if actors.idle and not others and self.times.is_straggler(seconds):
                self._report_straggler(shard, seconds)
                self._assign((actors.idle_for({actors.hosts[actor]}) or actors.idle)[-1], shard, task.claim)

    def _report_straggler(self, shard: str, seconds: float) -> None:
        self.report.stragglers += 1
        self._emit("late", shard=shard, seconds=seconds, median_s=self.times.median_s)

    # -- handling outcomes ----------------------------------------------------------------------------------------------

    def _replace_stuck_actors(self) -> None:
        for actor, assignment in list(self.actors.busy.items()):
            if silence := self.times.too_silent(assignment, self.clock()):
                self._handle(actor, ActorOutcome("failed", error=silence))

    def _handle(self, actor: int, outcome: ActorOutcome) -> None:
        actors = self.actors
        if actor not in actors.started_at:
            return  # it was stopped by what came at the same time from another one
        if outcome.kind in ("placed", "progress"):
            if (assignment := actors.busy.get(actor)) is not None:
                assignment.note(outcome.kind, self.clock())
            return
        assignment, host = actors.busy.pop(actor, None), actors.hosts.get(actor, "")
        starting = assignment is not None and assignment.task is None
        if outcome.kind == "failed" or (starting and outcome.kind != "started"):
            actors.lose(actor, outcome.error)
        else:
            actors.idle.append(actor)
        if starting and outcome.kind == "started":
            self._handle_start(actor, outcome)
        elif starting:
            actors.record_failed_start(outcome)
        elif assignment is not None and assignment.task is not None and assignment.task.shard in self.unfinished:
            self._handle_shard(assignment.task, outcome, host)

    def _handle_start(self, actor: int, outcome: ActorOutcome) -> None:
        self.actors.failed_starts, self.actors.pause_s = 0, self.timing.pause_s
        host = outcome.info["host"]
        if self.health.admits(host, self.actors.hosts.values()):
            self.actors.record_start(actor, outcome)
        else:
            self.actors.stop(actor)
            self.actors.pause_starts(f"{host} is left out, as shards failed there one after the other")

    def _handle_shard(self, task: ShardTask, outcome: ActorOutcome, host: str) -> None:
        shard = task.shard
        if outcome.kind == "done":
            self.health.record_done(host)
            self._mark_done(shard, LedgerEntry(outcome.result, outcome.work))
        elif outcome.kind == "taken":
            self.foreign[shard] = self.clock()
        else:
            became_sick = self.health.record_failure(shard, host, outcome.error if outcome.kind == "user error" else "")
            self._handle_failed_shard(task, outcome)
            if became_sick:
                self._leave_out(host, outcome.error)
            elif self.array and self.health.fails_all(host):
                self._leave_to_others(host, outcome.error)

    def _handle_failed_shard(self, task: ShardTask, outcome: ActorOutcome) -> None:
        """Try the shard again elsewhere, or give it up: what a user can fix after two hosts, or where there is no other one."""
        shard = task.shard
        self.report.failures[shard] = failures = self.report.failures.get(shard, 0) + 1
        if shard in self.actors.shards():
            return  # another actor does it as well
        if failures > self.max_retries or self._settled(shard):
            self._mark_poison(shard, outcome.error)
            return
        self._emit("retry", shard=shard, attempt=failures + 1, error=first_line(outcome.error))
        self.pending.append((shard, task.claim))

    def _settled(self, shard: str) -> str:
        return self.health.settled(shard, set(self.actors.hosts.values()), self.actors.more_expected())

    def _leave_out(self, host: str, error: str) -> None:
        """Stop the actors of a host where shards fail one after the other, and have their shards done elsewhere."""
        self._emit("sick_host", host=host, error=first_line(error))
        for actor in [actor for actor, at in self.actors.hosts.items() if at == host]:
            assignment = self.actors.busy.get(actor)
            self.actors.stop(actor)
            task = assignment.task if assignment else None
            if task is not None and task.shard in self.unfinished and task.shard not in self.actors.shards():
                self.pending.append((task.shard, task.claim))

    def _leave_to_others(self, host: str, error: str) -> None:
        """End as a task of a job array on a host where every shard fails, if there are other tasks. They try again what failed here."""
        retry_transient(self.watch.poll, self.timing.patience_s)
        if self.watch.alive().keys() - {self.lease.holder}:
            raise UserError(
                f"{host}: every shard fails on this host, and other tasks of the array go on without it. The last error:\n{error}\n"
                "Fix the host, or leave it out, and start its task again."
            )

    def _mark_done(self, shard: str, entry: LedgerEntry) -> None:
        del self.unfinished[shard]
        self.report.done[shard] = entry.result
        if entry.work.get("holder") == self.lease.holder:
            self.times.add(entry.work["seconds"])
        else:
            self.report.done_elsewhere += 1
        if shard in self.poison_before:
            retry_transient(lambda: self.ledger.clear_poison(shard), self.timing.patience_s)
        if self.on_progress:
            self.on_progress(shard, entry.result, self.report)

    def _mark_poison(self, shard: str, error: str) -> None:
        del self.unfinished[shard]
        self.report.poison[shard] = error
        failed_on = self.health.failed_on(shard)
        retry_transient(lambda: self.ledger.mark_poison(shard, error, self.lease.holder, failed_on), self.timing.patience_s)
        self._emit("poison", shard=shard, error=first_line(error))

    # -- other pools ----------------------------------------------------------------------------------------------------

    def _poll_other_pools(self) -> None:
        """Read from the ledger what other pools have finished, claimed, given up or left behind."""
        began, done = self.clock(), dict[str, LedgerEntry]()
        try:
            done = self._poll_ledger()
            self.unreadable_since = None
        except Exception as error:  # a storage that refuses now may answer at the next poll; not for ever, and never silently
            self.unreadable_since = self.unreadable_since or began
            if self.clock() - self.unreadable_since > self.timing.patience_s:
                raise
            self._emit("storage", error=f"{type(error).__name__}: {first_line(str(error))}")
        self.next_poll = self.clock() + max(self.timing.poll_s, 20 * (self.clock() - began))
        for shard, entry in done.items():  # not above: what `on_progress` raises is no error of the storage, and ends the pool
            self._mark_done(shard, entry)

    def _poll_ledger(self) -> dict[str, LedgerEntry]:
        """Sort the shards that no actor of ours does into poison, pending and foreign; returns those that are done."""
        done = dict[str, LedgerEntry]()
        claims = self.ledger.claims()  # before the entries: a claim is released after its entry is written
        pending, foreign = dict(self.pending), self.foreign
        entries = self.ledger.entries([*pending, *foreign])
        poison = self.ledger.poison()
        self.watch.poll()
        free, taken = deque[tuple[str, int]](), dict[str, float]()
        for shard in (*pending, *foreign):
            claim, since = claims.get(shard), foreign.get(shard, self.clock())
            if shard not in self.unfinished:
                continue
            if shard in entries:
                done[shard] = entries[shard]
            elif shard in poison and poison[shard]["holder"] != self.poison_before.get(shard):
                if self._accepts_poison(shard, poison[shard]):
                    del self.unfinished[shard]
                    self.report.poison[shard] = poison[shard]["error"]
                else:
                    free.append((shard, claim.number + 1 if claim else 0))
            elif claim is None or claim.holder == self.lease.holder or pending.get(shard, 0) > claim.number:
                free.append((shard, pending.get(shard, 0)))
            elif self.watch.expired(claim.holder):
                self._emit("taken_over", shard=shard, holder=claim.holder)
                free.append((shard, claim.number + 1))
            elif self.actors.idle and self.times.is_straggler(self.clock() - since):
                self._report_straggler(shard, self.clock() - since)
                free.append((shard, claim.number + 1))
            else:
                taken[shard] = since
        self.pending, self.foreign = free, taken  # at the end: a shard in neither, as after an error half-way, would be waited for for ever
        return done

    def _accepts_poison(self, shard: str, note: Record) -> bool:
        """Whether a shard that another pool has given up is given up here, too; not where its host may be at fault, and we have others."""
        hosts, error = note.get("hosts", []), note["error"]
        self.health.record_elsewhere(shard, hosts, error)
        if not hosts or self._settled(shard):
            return True
        self.poison_before[shard] = note["holder"]  # it does not count any more, and is removed when the shard is done
        return False

    def _remove_stale_records(self) -> None:
        """Remove claims and drafts of those who died between entering a shard and removing them. They do no harm: all is done already."""
        try:
            for claim in self.ledger.claims().values():
                if claim.shard in self.report.done:
                    self.ledger.release(claim)
            self.ledger.remove_drafts(self.report.done)
        except UserError as error:
            self._emit("storage", error=first_line(str(error)))

    # -- being stopped --------------------------------------------------------------------------------------------------

    def _drain(self, reason: str) -> int:
        """Let running shards end if they do so in time; claims beyond that are released as the lease ends. Returns how many did not end."""
        actors = self.actors
        self._emit("draining", reason=reason, running=len(actors.busy) - len(actors.starting()), grace_s=self.timing.grace_s)
        end, before = self.clock() + self.timing.grace_s, len(self.report.done)
        for actor in [*actors.idle, *actors.starting()]:
            actors.stop(actor)
        while actors.busy and (left := end - self.clock()) > 0:
            for actor, outcome in actors.backend.wait(min(1.0, left)):
                self._handle(actor, outcome)
                if actor in actors.started_at and actor not in actors.busy:  # one that reports progress goes on
                    actors.stop(actor)
        self._emit("drained", finished=len(self.report.done) - before, handed_back=len(actors.busy))
        return len(actors.busy)
