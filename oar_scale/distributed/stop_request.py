"""How the driver asks the workers to stop: an actor whose answer rank 0 waits for, and to which each worker says where it runs.

A worker under Ray Train gets no signals of its own: SIGTERM and SIGUSR1 come to the driver. :class:`StopWatcher` turns them into a stop
request, and makes one, too, when the cluster has capacity for more workers than an elastic run has.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from oar_scale.runtime.stop_signals import StopSignals

if TYPE_CHECKING:
    from ray.actor import ActorHandle

GROW = "more workers have room"
"""The reason to stop after which the driver starts more workers."""
POLL_S = 0.2
CAPACITY_POLL_S = 10.0
"""Between two looks at the capacity of the cluster; the larger one has to be seen twice in a row."""
_log = logging.getLogger(__name__)


class StopRequest:
    """An async actor: any number of callers may wait for its first reason."""

    def __init__(self) -> None:
        self._made = asyncio.Event()
        self._reason = ""
        self._workers_on: Counter[str] = Counter()

    async def request(self, reason: str) -> None:
        """Ask for a stop; the first reason counts."""
        self._reason = self._reason or reason
        self._made.set()

    async def started_on(self, node: str) -> None:
        """A worker has started on this node (Ray's id)."""
        self._workers_on[node] += 1

    async def workers_by_node(self) -> dict[str, int]:
        """How many workers have started on each node."""
        return dict(self._workers_on)

    async def wait(self) -> str:
        """Block until a stop is requested; return the reason."""
        await self._made.wait()
        return self._reason


def start_stop_request() -> ActorHandle[StopRequest]:
    """Start the actor on the driver's node, with which it may be lost, but not with another one; return its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(StopRequest)  # its types allow for the class itself as a result of remote()
    handle: ActorHandle[StopRequest] = actor.options(num_cpus=0, max_concurrency=8, scheduling_strategy=here).remote()
    return handle


def wait_for_stop(stop_request: ActorHandle[StopRequest]) -> str:
    """Block a worker until a stop is requested; return the reason."""
    import ray

    return str(ray.get(stop_request.wait.remote()))


class StopWatcher:
    """A thread that watches for reasons to stop while the workers run, and passes the first one on to them.

    Args:
        stop_request: the actor that the workers wait for.
        signals: the driver's own.
        may_grow: whether the cluster has capacity for more workers; None where their number is fixed.
    """

    def __init__(self, stop_request: ActorHandle[StopRequest], signals: StopSignals, may_grow: Callable[[], bool] | None) -> None:
        self._stop_request, self._signals, self._may_grow = stop_request, signals, may_grow
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop watcher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, polled = 0, time.monotonic()
        while not self._ended.wait(POLL_S):
            if self._signals.reason is not None:  # requested from here: a signal handler must not call Ray, which the main thread may be in
                return self._request(self._signals.reason)
            if self._may_grow is not None and time.monotonic() - polled > CAPACITY_POLL_S:
                polled = time.monotonic()
                seen = seen + 1 if self._grows() else 0
                if seen == 2:
                    return self._request(GROW)
        return None

    def _grows(self) -> bool:
        """Whether the run may grow. A poll that fails, whatever Ray or the storage raises, must not end this thread: signals need it."""
        try:
            return self._may_grow is not None and self._may_grow()
        except Exception as error:
            _log.warning("the capacity of the cluster is not known now: %s", error)
            return False

    def _request(self, reason: str) -> None:
        self._stop_request.request.remote(reason)
