"""Where the actors of a pool live: in Ray, on one machine or many, or in child processes of this one.

actor = actors.start()                  asks for a process; it is placed, and then its next outcome is that of making its worker
actors.run(actor, task)                one task at a time
actors.wait(1.0)                        [(actor, outcome), ...]: also of those whose process died; "progress" of those that are busy
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from oar_scale.runtime.child_process import end_with_parent
from oar_scale.shard_pool.actor import Actor, ActorOutcome, ShardTask

if TYPE_CHECKING:
    from ray import ObjectRef, ObjectRefGenerator
    from ray.actor import ActorHandle

    _Call: TypeAlias = ObjectRef[ActorOutcome] | ObjectRefGenerator
MakeActor = Callable[[], Actor]


class ActorBackend(Protocol):
    """Starts, runs and ends actors, which it numbers."""

    def start(self) -> int:
        """Ask for a new process and return the number of its actor; its first outcome comes when it has been placed."""
        ...

    def run(self, actor: int, task: ShardTask) -> None:
        """Give a task to an actor that is idle; its progress and its outcome come from :meth:`wait`."""
        ...

    def wait(self, timeout_s: float) -> list[tuple[int, ActorOutcome]]:
        """The outcomes that have come, at the latest after ``timeout_s``."""
        ...

    def kill(self, actor: int) -> None:
        """End an actor's process at once; no outcome comes from it any more."""
        ...

    def capacity(self) -> int:
        """Estimate of how many more actors could start at once."""
        ...

    def close(self) -> None:
        """Kill all actors that are left."""
        ...


class RayActors:
    """Actors of the Ray that this process is connected to."""

    def __init__(self, make_actor: MakeActor, cpus: int, gpus: float, gpu_type: str | None = None) -> None:
        self._make_actor, self._cpus, self._gpus, self._gpu_type = make_actor, cpus, gpus, gpu_type
        self._actors: dict[int, ActorHandle[_RayActor]] = {}
        self._pending: dict[_Call, int] = {}
        self._count = 0

    def start(self) -> int:
        """Create an actor in Ray, which places it as soon as a node has the resources for it."""
        import ray

        self._count += 1
        needs = {"num_cpus": self._cpus, "num_gpus": self._gpus, **({"accelerator_type": self._gpu_type} if self._gpu_type else {})}
        remote: Any = ray.remote(_RayActor).options(**needs, max_restarts=0)
        self._actors[self._count] = remote.remote(self._make_actor)
        self._pending[self._actors[self._count].placed.remote()] = self._count
        return self._count

    def run(self, actor: int, task: ShardTask) -> None:
        """Call the actor with a task; what it yields comes as it is yielded."""
        self._pending[self._actors[actor].run.options(num_returns="streaming").remote(task)] = actor

    def wait(self, timeout_s: float) -> list[tuple[int, ActorOutcome]]:
        """Return the outcomes of all calls that have one; an actor that has just been placed is told to make its worker."""
        import ray

        if not self._pending:
            time.sleep(timeout_s)
            return []
        ready = ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)[0]
        if ready:
            ready = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)[0]
        results = [(call, self._pending.pop(call), _result(call)) for call in ready]
        for call, actor, outcome in results:
            if outcome.kind == "placed":
                self._pending[self._actors[actor].start.remote()] = actor
            elif outcome.kind == "progress":
                self._pending[call] = actor
        return [(actor, outcome) for _, actor, outcome in results]

    def kill(self, actor: int) -> None:
        """Kill the actor; Ray does not restart it."""
        import ray

        ray.kill(self._actors.pop(actor))
        self._pending = {call: other for call, other in self._pending.items() if other != actor}

    def capacity(self) -> int:
        """The number of actors that the cluster's free CPUs and GPUs would hold now."""
        import ray

        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        by_gpu = free.get("GPU", 0) / self._gpus if self._gpus else float("inf")
        return int(min(free.get("CPU", 0) / self._cpus, by_gpu))

    def close(self) -> None:
        """Kill all actors that are left."""
        for actor in list(self._actors):
            self.kill(actor)


class _RayActor:
    """An :class:`Actor` that is made in its own process: what makes it must not fail while Ray unpickles it."""

    def __init__(self, make_actor: MakeActor) -> None:
        self._actor = make_actor()

    def placed(self) -> ActorOutcome:
        return ActorOutcome("placed")

    def start(self) -> ActorOutcome:
        return self._actor.start()

    def run(self, task: ShardTask) -> Iterator[ActorOutcome]:
        """The task's progress, then its outcome. It is done in a thread beside this one, which Ray streams from."""
        outcomes: SimpleQueue[ActorOutcome] = SimpleQueue()

        def work() -> None:
            outcome = ActorOutcome("failed", error="the worker ended its thread")
            try:
                outcome = self._actor.run(task, outcomes.put)
            finally:
                outcomes.put(outcome)

        threading.Thread(target=work, name="pool-task", daemon=True).start()
        outcome = ActorOutcome("progress")
        while outcome.kind == "progress":
            yield (outcome := outcomes.get())


def _result(call: _Call) -> ActorOutcome:
    import ray

    try:
        outcome: ActorOutcome = ray.get(next(call) if isinstance(call, ray.ObjectRefGenerator) else call)
        return outcome
    except ray.exceptions.RayError as error:
        return ActorOutcome("failed", error=f"its process died: {error}")


class ProcessActors:
    """Actors that are children of this process, and end with it."""

    def __init__(self, make_actor: MakeActor) -> None:
        self._make_actor = make_actor
        self._children: dict[int, tuple[BaseProcess, Connection]] = {}
        self._count = 0

    def start(self) -> int:
        """Start a child process, which makes its worker at once."""
        context = multiprocessing.get_context("spawn")  # a fork would inherit threads, and a GPU that cannot be shared like that
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._make_actor), name="pool-actor", daemon=True)
        process.start()
        theirs.close()
        self._count += 1
        self._children[self._count] = process, ours
        return self._count

    def run(self, actor: int, task: ShardTask) -> None:
        """Send a task to the child; that it has died shows in :meth:`wait`."""
        with suppress(OSError):  # a dead one is seen by wait()
            self._children[actor][1].send(task)

    def wait(self, timeout_s: float) -> list[tuple[int, ActorOutcome]]:
        """Return an outcome of each child that has sent one or has died, at the latest after ``timeout_s``."""
        ends: list[Connection | int] = []
        owners: dict[object, int] = {}
        for actor, (process, connection) in self._children.items():
            ends += [connection, process.sentinel]
            owners[connection] = owners[process.sentinel] = actor
        if not ends:
            time.sleep(timeout_s)
        ready = {owners[end] for end in wait(ends, timeout_s)}
        return [(actor, self._outcome(actor)) for actor in sorted(ready)]

    def _outcome(self, actor: int) -> ActorOutcome:
        process, connection = self._children[actor]
        with suppress(EOFError, OSError):  # nothing more comes from it
            if connection.poll():
                outcome: ActorOutcome = connection.recv()
                return outcome
        process.join(5)
        return ActorOutcome("failed", error=f"its process died: exit code {process.exitcode}")

    def kill(self, actor: int) -> None:
        """Kill the child and wait for its end."""
        process, connection = self._children.pop(actor)
        process.kill()
        process.join()
        connection.close()

    def capacity(self) -> int:
        """Always 0: the number of processes is fixed by who starts them."""
        return 0

    def close(self) -> None:
        """Kill all children that are left."""
        for actor in list(self._children):
            self.kill(actor)


def _serve(connection: Connection, make_actor: MakeActor) -> None:
    """The main function of a child process. Signals that are sent to a whole process group are for the parent to act on."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    actor = make_actor()
    connection.send(ActorOutcome("placed"))
    connection.send(actor.start())
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(actor.run(task, connection.send))
