"""Savers and two pruners on a simulated storage, in every order in which their requests can arrive.

Each of them runs the code that real savers and pruners run, against a storage that is a dict. What a process does next depends on
nothing but the answers that it has got so far, so its next request is found by running its code on them again. A state is what the storage
holds, and the answers of each process; from there each process that has not ended may be the next one whose request is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
from crc32c import crc32c

from oar_scale.distributed.checkpoints import layout
from oar_scale.distributed.checkpoints.layout import MANIFEST, DamagedCheckpoint
from oar_scale.distributed.checkpoints.retention import Keep, Retention, prune
from oar_scale.storage import Missing, join

CHECKPOINTS = "s3://simulated/checkpoints/pretrain"
SHARD = "shard.pt"
FIRST = 100
"""The step of which there is a checkpoint at the beginning."""
ATTEMPTS = [f"20260101T00000{number}Z-0000000{number}" for number in range(3)]
LATER = 4e9
"""A time at which a pruner takes every attempt without a marker for a dead one, which is the worst that can happen."""

Objects = frozenset[tuple[str, bytes]]
Answers = tuple[Any, ...]
ENDED = -1


class Pending(BaseException):
    """A process waits for the answer to a request."""

    def __init__(self, *request: Any) -> None:
        self.request = request


class Replay:
    """A storage that gives the answers of before, and then stops the process at its next request."""

    def __init__(self, answers: Answers) -> None:
        self._answers = iter(answers)

    def _answer(self, *request: Any) -> Any:
        for answer in self._answers:
            return answer
        raise Pending(*request)

    def read(self, uri: str) -> bytes:
        data: bytes | None = self._answer("read", uri)
        if data is None:
            raise Missing(uri)
        return data

    def write(self, uri: str, data: bytes, *, if_absent: bool = False) -> bool:
        if uri.endswith(f"/{layout.LATEST}"):
            return True  # nothing here reads it: it only makes more states
        return bool(self._answer("create" if if_absent else "write", uri, data))

    def list(self, prefix: str) -> list[str]:
        return list(self._answer("list", f"{prefix}/"))

    def delete(self, uri: str) -> None:
        if not uri.endswith(f"/{layout.LATEST}"):
            self._answer("delete", uri)


def answered(objects: Objects, kind: str, uri: str, data: bytes = b"") -> tuple[Objects, Any]:
    """The objects after a request, and its answer."""
    here = dict(objects)
    match kind:
        case "read":
            return objects, here.get(uri)
        case "list":
            return objects, tuple(sorted(name for name in here if name.startswith(uri)))
        case "create" if uri in here:
            return objects, False
        case "delete":
            here.pop(uri, None)
            return frozenset(here.items()), None
        case _:
            return frozenset({**here, uri: data}.items()), True


def saver(step: int, save: str) -> None:
    """What the ranks of a group do together: upload, commit, and clean up where the attempt lost."""
    uri = layout.step_uri(CHECKPOINTS, step)
    layout.open_storage(uri).write(join(uri, save, SHARD), b"shard")
    try:
        layout.commit(uri, save, manifest(step))
    except DamagedCheckpoint:
        layout.delete(uri, [f"{save}/{name}" for name in (SHARD, MANIFEST)])


def replacer(step: int, save: str) -> None:
    """What a group does that finds the newest checkpoint damaged: it goes on from one before, and saves an earlier step than that."""
    layout.uncommit(layout.step_uri(CHECKPOINTS, FIRST))
    saver(step, save)


def pruner(keep: int) -> None:
    """What ``oar checkpoint prune``, and each saver after a commit, does."""
    with suppress(Missing):
        prune(layout.checkpoint_locations(CHECKPOINTS), Retention(Keep(keep)), LATER)


def manifest(step: int) -> dict[str, Any]:
    files = {SHARD: {"bytes": 5, "crc32c": crc32c(b"shard"), "rank": 0}}
    return {"step": step, "world_size": 1, "zero_stage": 2, "state": {}, "files": files}


class State(NamedTuple):
    """Small, for there are many: what it holds is numbered by the model."""

    objects: int
    answers: tuple[int, ...]
    """Of each process; ENDED when it has none to wait for any more. Those of the pruners are sorted: they are the same process twice."""
    committed: frozenset[int]
    """Steps that have had a marker at some time."""


class Numbers:
    """A number for each value, the same for equal ones."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self.values: list[Any] = []

    def of(self, value: Any) -> int:
        if (number := self._numbers.setdefault(value, len(self.values))) == len(self.values):
            self.values.append(value)
        return number


class Model:
    """All states of some savers, and of two pruners, which keep ``keep`` checkpoints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, savers: Sequence[Callable[[], None]], keep: int) -> None:
        self._patch, self._savers, self._keep = monkeypatch, savers, keep
        self._objects, self._answers = Numbers(), Numbers()
        self.request, self.after, self.intact = cache(self._request), cache(self._after), cache(self._intact)

    def _request(self, process: int, answers: int) -> tuple[Any, ...] | None:
        """The next request of a process that has got these answers; None: it has ended."""
        storage = Replay(self._answers.values[answers])
        self._patch.setattr(layout, "open_storage", lambda uri: storage)
        try:
            if process < len(self._savers):
                self._savers[process]()
            else:
                pruner(self._keep)
        except Pending as pending:
            return pending.request
        return None

    def _after(self, process: int, objects: int, answers: int) -> tuple[int, int, frozenset[int]]:
        """The objects and the process's answers once its request is answered, and the steps that have a marker then.

        The answers are ENDED where it asks no more: what a process that has ended was told makes no difference.
        """
        request = self.request(process, answers)
        assert request is not None
        here, answer = answered(self._objects.values[objects], *request)
        told = self._answers.of((*self._answers.values[answers], answer))
        return self._objects.of(here), ENDED if self.request(process, told) is None else told, marked(here)

    def _intact(self, objects: int, step: int) -> bool:
        """Whether a step's marker names an attempt of which everything is there."""
        uri, here = layout.step_uri(CHECKPOINTS, step), dict(self._objects.values[objects])

        class Reading(Replay):
            def read(self, uri: str) -> bytes:
                if uri not in here:
                    raise Missing(uri)
                return here[uri]

        self._patch.setattr(layout, "open_storage", lambda uri: Reading(()))
        try:
            checkpoint = layout.read_checkpoint(uri)
        except DamagedCheckpoint:
            return False
        return all(join(checkpoint.folder, name) in here for name in checkpoint.files)

    def visit(self, start: Objects, check: Callable[[Model, State], None]) -> int:
        """Visit every state that can be reached; returns how many there are."""
        count = len(self._savers)
        todo = [State(self._objects.of(start), (self._answers.of(()),) * (count + 2), marked(start))]
        seen = set(todo)
        while todo:
            state = todo.pop()
            for process, answers in enumerate(state.answers):
                if answers == ENDED:
                    continue
                objects, told, marked_now = self.after(process, state.objects, answers)
                each = [*state.answers[:process], told, *state.answers[process + 1 :]]
                after = State(objects, (*each[:count], *sorted(each[count:])), state.committed | marked_now)
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
                    check(self, after)
        return len(seen)

    def keeps_the_newest(self, state: State) -> None:
        """Fails where a kept checkpoint is lost."""
        for step in sorted(state.committed)[-self._keep :]:
            assert self.intact(state.objects, step), f"step {step} is lost:\n{self.names(state)}"

    def keeps_what_replaces(self, state: State) -> None:
        """Fails where the rejected checkpoint is there beside the one that replaces it, or that one is lost."""
        if len(state.committed) > 1:
            (step,) = state.committed - {FIRST}
            assert self.intact(state.objects, step), f"step {step} is lost:\n{self.names(state)}"
            assert FIRST not in marked(self._objects.values[state.objects]), f"step {FIRST} is back:\n{self.names(state)}"

    def names(self, state: State) -> list[str]:
        """The objects that there are."""
        return sorted(dict(self._objects.values[state.objects]))


@cache
def marked(objects: Objects) -> frozenset[int]:
    return frozenset(int(uri.split("/")[-2][5:]) for uri, _ in objects if uri.endswith(layout.MARKER))


def one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Objects:
    """A storage with a checkpoint of the first step."""
    uri = layout.step_uri(CHECKPOINTS, FIRST)
    objects = frozenset({(join(uri, ATTEMPTS[0], SHARD), b"shard")})
    answers: Answers = ()
    while True:
        storage = Replay(answers)
        monkeypatch.setattr(layout, "open_storage", lambda uri, storage=storage: storage)
        try:
            layout.commit(uri, ATTEMPTS[0], manifest(FIRST))
        except Pending as pending:
            objects, answer = answered(objects, *pending.request)
            answers = (*answers, answer)
        else:
            return objects


@pytest.mark.parametrize(
    ("steps", "keep"),
    [((200, 200), 1), pytest.param((200, 300), 1, marks=pytest.mark.slow), pytest.param((200, 200), 2, marks=pytest.mark.slow)],
)
def test_no_order_of_requests_loses_a_checkpoint(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, int], keep: int) -> None:
    """The newest checkpoints that have ever been committed are there and complete, whoever saves and removes at the same time."""
    savers = [partial(saver, step, save) for step, save in zip(steps, ATTEMPTS[1:], strict=True)]
    assert Model(monkeypatch, savers, keep).visit(one_checkpoint(monkeypatch), Model.keeps_the_newest) > 10_000


def test_no_order_of_requests_brings_a_rejected_one_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be the newest one, and those that replace it would be removed."""
    model = Model(monkeypatch, [partial(replacer, 50, ATTEMPTS[1])], keep=1)
    assert model.visit(one_checkpoint(monkeypatch), Model.keeps_what_replaces) > 100
