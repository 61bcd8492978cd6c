"""Which tests start a server or a group of processes: the markers that the make targets choose by, put on by what a test calls.

    gloo    starts a process group (``launcher.start_workers``)
    s3      talks to a real S3 server (the fixture ``s3_root``, or ``cluster.dev.s3.up``)
    ray     starts Ray (``ray_session``, or ``cluster.dev.ray.up``)
    slurm   starts Slurm (``cluster.dev.slurm.up``)
    slow    a Ray of several nodes (``cluster.dev.ray.up``); by hand, what takes minutes rather than seconds

The functions that start something are wrapped when pytest begins (:data:`STARTERS`). At collection, each test's code is searched for them:
through the fixtures that it uses, the functions and classes of ``tests/`` and ``cluster/`` that these call, and so on. What this search
cannot see (a command in another process, a fixture that is requested by a computed name) carries its marker by hand; a starter that is
called in a test without its marker fails that test, so a marker that is missing does not remain unnoticed.

Under ``pytest -n``, the tests of a module run in one worker, as its fixtures are made once; so do all modules that share a Ray. (Not by
xdist's ``loadgroup``: it writes a private attribute of pytest's items that pytest 9.2 no longer reads, and so groups nothing.)
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
SEARCHED = (str(ROOT / "tests"), str(ROOT / "cluster"))
STARTERS = {
    ("launcher", "start_workers"): ("gloo",),
    ("tests.launcher", "start_workers"): ("gloo",),
    ("cluster.dev.s3", "up"): ("s3",),
    ("cluster.dev.ray", "up"): ("ray", "slow"),
    ("oar_scale.runtime.ray_session", "ray_session"): ("ray",),
    ("cluster.dev.slurm", "up"): ("slurm",),
}
FIRST = ("slurm", "ray", "slow", "gloo", "s3")
"""What takes longest is begun first, or one worker would end long after the others."""

_running: list[pytest.Item] = []


def wrap_starters() -> None:
    """Make every starter check the test that calls it. Before test modules are imported: they may hold the function itself."""
    for (module, name), markers in STARTERS.items():
        holder = importlib.import_module(module)
        function = getattr(holder, name)
        if not hasattr(function, "starts"):
            setattr(holder, name, _checked(function, markers))


def _checked(function: Callable[..., Any], markers: tuple[str, ...]) -> Callable[..., Any]:
    @functools.wraps(function)
    def start(*arguments: Any, **options: Any) -> Any:
        for item in _running:
            if missing := [marker for marker in markers if not item.get_closest_marker(marker)]:
                decorators = ", ".join(f"@pytest.mark.{marker}" for marker in missing)
                pytest.fail(f"{item.nodeid} calls {function.__module__}.{function.__name__}: it needs {decorators}")
        return function(*arguments, **options)

    start.starts = markers  # type: ignore[attr-defined]
    return start


# -- hooks ---------------------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.remove(item)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in sorted(started_by(item)):
            if not item.get_closest_marker(marker):
                item.add_marker(marker)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_rank)
    items.sort(key=lambda item: "shared_ray" not in getattr(item, "fixturenames", ()))  # it ends before a test that does not want it


class ModuleScheduling(LoadScopeScheduling):
    """A module goes to one worker; the modules that share a Ray all go to the same one."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        path = self.config.rootpath / module  # the repository, unless pytest was told another root
        return "shared_ray" if "shared_ray" in path.read_text(encoding="utf-8") else module


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ModuleScheduling:
    """Called where tests run in several processes."""
    config.option.loadscopereorder = False  # the order of the collection puts the longest first
    return ModuleScheduling(config, log)


def _rank(item: pytest.Item) -> int:
    return next((rank for rank, marker in enumerate(FIRST) if item.get_closest_marker(marker)), len(FIRST))


# -- what a test starts --------------------------------------------------------------------------------------------------------


def started_by(item: pytest.Item) -> set[str]:
    """The markers of all starters that the code of a test and of its fixtures leads to; of the parameter ``s3``, that server."""
    functions = [getattr(item, "function", None)]
    info = getattr(item, "_fixtureinfo", None)
    if info is not None:
        functions += [fixture.func for name in info.names_closure for fixture in info.name2fixturedefs.get(name, ())]
    services = {"s3"} if "s3" in getattr(getattr(item, "callspec", None), "params", {}).values() else set()
    return services.union(*(_starts(function) for function in functions if isinstance(function, FunctionType)))


@functools.cache
def _starts(function: FunctionType) -> frozenset[str]:
    """Most functions lead to no starter by any name in their code; of the others the instructions are read, which takes long."""
    return _found(function, _called) if _found(function, _perhaps_called) else frozenset()


def _found(function: FunctionType, called_by: Callable[[Any], tuple[Any, ...]]) -> frozenset[str]:
    markers: set[str] = set()
    seen: set[Any] = set()
    todo: list[Any] = [function]
    while todo:
        each = todo.pop()
        if starts := getattr(each, "starts", None):
            markers.update(starts)
        elif isinstance(each, type):
            todo += [member for member in vars(each).values() if _ours(member) and member not in seen]
        else:
            todo += [called for called in called_by(inspect.unwrap(each)) if called not in seen]
        seen.add(each)
    return frozenset(markers)


@functools.cache
def _perhaps_called(function: Any) -> tuple[Any, ...]:
    """All that is called, and what has the name of an attribute by chance."""
    names = set(_all_names(function.__code__))
    values = [function.__globals__[name] for name in names & function.__globals__.keys()]
    modules = [value for value in values if isinstance(value, ModuleType) and _leads_on(value)]
    values += [vars(module)[name] for module in modules for name in names & vars(module).keys()]
    return tuple({value for value in values if _ours(value)})


@functools.cache
def _called(function: Any) -> tuple[Any, ...]:
    return tuple(called for called in _named(function) if _ours(called))


def _named(function: Any) -> Iterator[Any]:
    """Objects that the names in a function's code stand for: its module's own, and members of modules that it names."""
    for name, member in _names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            yield getattr(value, member, None)
        else:
            yield value


def _names(code: CodeType) -> Iterator[tuple[str, str]]:
    """Global names in the code, each with the attribute that is read of it, or an empty string."""
    instructions = [each for each in dis.get_instructions(code) if each.opname not in ("PUSH_NULL", "CACHE")]
    for each, after in itertools.pairwise(instructions):
        if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield each.argval, after.argval if after.opname in ("LOAD_ATTR", "LOAD_METHOD") else ""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _all_names(code: CodeType) -> Iterator[str]:
    """Names of globals and of attributes alike."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _all_names(constant)


def _leads_on(value: Any) -> bool:
    """What is searched or starts something, and modules that may have such members."""
    if isinstance(value, ModuleType):
        return _searched(value) or any(value.__name__ == module for module, _ in STARTERS)
    return _ours(value)


def _ours(value: Any) -> bool:
    """Functions and classes that are searched, and the starters themselves."""
    if not isinstance(value, FunctionType | type):
        return False
    return hasattr(value, "starts") or _searched(sys.modules.get(value.__module__))


def _searched(module: ModuleType | None) -> bool:
    return str(getattr(module, "__file__", "")).startswith(SEARCHED)
