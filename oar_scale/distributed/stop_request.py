"""How the driver asks the workers to leave: an actor that rank 0 waits for.

A worker under Ray Train gets no signals of its own: SIGTERM and SIGUSR1 come to the driver. The watch below rings for them, and when the
cluster has room for more workers than an elastic run has.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from oar_scale.runtime.stop_signals import StopSignals

GROW = "more workers have room"
"""The reason to leave that is no end: the driver starts more of them."""
POLL_S = 0.2
LOOK_S = 10.0
"""Between two looks at the size of the cluster; it has to be seen twice."""
_log = logging.getLogger(__name__)


class _Bell:
    """An async actor: any number may wait."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()
        self._reason = ""

    async def ring(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._rung.set()

    async def wait(self) -> str:
        await self._rung.wait()
        return self._reason


def make_bell() -> Any:
    """A bell on this node, where the driver is: it shall not be lost with another one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    bell: Any = ray.remote(_Bell)
    return bell.options(num_cpus=0, max_concurrency=8, scheduling_strategy=here).remote()


def wait_for(bell: Any) -> str:
    """In a worker: blocks until the bell is rung; the reason."""
    import ray

    return str(ray.get(bell.wait.remote()))


class Watch:
    """While the workers run: rings for the signals that ``stop`` notes, and for ``may_grow``."""

    def __init__(self, bell: Any, stop: StopSignals, may_grow: Callable[[], bool] | None) -> None:
        self._bell, self._stop, self._may_grow = bell, stop, may_grow
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="bell", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, looked = 0, time.monotonic()
        while not self._ended.wait(POLL_S):
            if self._stop.reason is not None:  # from here: the handler must not call Ray, which the main thread may be in
                return self._ring(self._stop.reason)
            if self._may_grow is not None and time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                seen = seen + 1 if self._grows() else 0
                if seen == 2:
                    return self._ring(GROW)
        return None

    def _grows(self) -> bool:
        """A look that fails, whatever Ray or the storage says, must not end this thread: it rings for signals, too."""
        try:
            return self._may_grow is not None and self._may_grow()
        except Exception as error:
            _log.warning("the size of the cluster is not known now: %s", error)
            return False

    def _ring(self, reason: str) -> None:
        self._bell.ring.remote(reason)
