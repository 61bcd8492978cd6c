"""A pool's actors as objects of the test's own process, one of them at work at a time.

The driver, the ledger and the workers are the real ones, and whatever makes an actor is pickled as on its way to another process. What is
about those processes (that they die, hang, start late, or work at the same time) needs Ray: ``test_shard_pool.py``, and one test of each
kind of pool. Everything else can do without their starts, which take seconds of CPU each.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
from ray import cloudpickle

from oar_scale.shard_pool import pool_run
from oar_scale.shard_pool.actor import Actor, ActorOutcome, ShardTask
from oar_scale.shard_pool.backends import MakeActor


class ActorsHere:
    """An ``ActorBackend``: each wait does the oldest thing that an actor was asked for, and returns its outcome."""

    def __init__(self, make_actor: MakeActor, cpus: int, gpus: float, gpu_type: str | None = None) -> None:
        self._make_actor = make_actor
        self._actors: dict[int, Actor] = {}
        self._asked: deque[tuple[int, Callable[[], ActorOutcome]]] = deque()
        self._numbers = itertools.count(1)

    def start(self) -> int:
        number = next(self._numbers)
        actor = self._actors[number] = pickle.loads(cloudpickle.dumps(self._make_actor))()
        self._asked += [(number, lambda: ActorOutcome("placed")), (number, actor.start)]
        return number

    def run(self, actor: int, task: ShardTask) -> None:
        self._asked.append((actor, partial(self._actors[actor].run, task, lambda outcome: None)))

    def wait(self, timeout_s: float) -> list[tuple[int, ActorOutcome]]:
        if not self._asked:
            time.sleep(timeout_s)
            return []
        actor, do = self._asked.popleft()
        return [(actor, do())]

    def kill(self, actor: int) -> None:
        del self._actors[actor]
        self._asked = deque(asked for asked in self._asked if asked[0] != actor)

    def capacity(self) -> int:
        return 0

    def close(self) -> None:
        self._actors.clear()
        self._asked.clear()


@contextmanager
def pools_here() -> Iterator[None]:
    """Pools that are run meanwhile start no Ray and no process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_run, "RayActors", ActorsHere)
        patch.setattr(pool_run, "ray_session", lambda **_: nullcontext())
        yield
