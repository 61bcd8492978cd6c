"""Work in daemon threads: unlike those of an Executor, a process that ends does not wait for them (and for a stalled connection)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def start(work: Callable[[], B]) -> Future[B]:
    """Begin ``work`` in a thread of its own."""
    future: Future[B] = Future()
    threading.Thread(target=_settle, args=(future, work), daemon=True).start()
    return future


def in_order(work: Callable[[A], B], items: Sequence[A], threads: int) -> Iterator[B]:
    """``map(work, items)``, several at once, in the context of the caller; the first error ends it, and no further item is begun."""
    if min(len(items), threads) <= 1:
        yield from map(work, items)
        return
    futures: list[Future[B]] = [Future() for _ in items]
    todo = deque(zip(items, futures, strict=True))

    def worker() -> None:
        while True:
            try:
                item, future = todo.popleft()
            except IndexError:
                return
            _settle(future, lambda item=item: work(item))  # type: ignore[misc]

    for _ in range(min(threads, len(items))):  # each in a context of its own, with the caller's patience (storage/patience.py)
        threading.Thread(target=copy_context().run, args=(worker,), daemon=True).start()
    try:
        for future in futures:
            yield future.result()
    finally:
        todo.clear()


def _settle(future: Future[B], work: Callable[[], B]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # for the caller that takes the result
        future.set_exception(error)
