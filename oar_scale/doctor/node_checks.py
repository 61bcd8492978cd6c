"""What only several machines together can tell: the same versions, the same clock, the same storage, a network between them.

with left_as_found(root):                        from before the first to after the last
    facts = node_facts(name, recipe)             on each node
    findings = between(place, recipe)            in each worker, all at once; rank 0 gets the answer
merged(all facts)                                wherever they are collected: one line an item, however many nodes
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from oar_scale import __version__
from oar_scale.doctor import machine
from oar_scale.doctor import storage_checks as places
from oar_scale.doctor.finding import Finding, first_line, guarded

if TYPE_CHECKING:
    import torch

    from oar_scale.config.schema import Recipe

T = TypeVar("T")
GROUP_S = 120.0
SKEW_S = 1.0
"""More than this confuses logs, and S3 refuses requests that are minutes off."""
ROUNDS = 5
SLOW_GB_S = {"nccl": 2.0, "gloo": 0.05}
"""Below it the network is not the one that was paid for."""
NAMED = 3
"""Nodes named in a line."""


@dataclass(frozen=True)
class Facts:
    """What a node says of itself."""

    node: str
    versions: dict[str, str]
    findings: list[Finding]

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(plain: dict[str, Any]) -> Facts:
        return Facts(plain["node"], plain["versions"], [Finding(**finding) for finding in plain["findings"]])


@dataclass(frozen=True)
class Place:
    """A worker's place in the group."""

    node: str
    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    gpu: int | None = field(default=None)
    """Index of its GPU, as this process sees them."""


def node_facts(node: str, recipe: Recipe | None) -> Facts:
    """Versions, devices and, with a recipe, its places as seen from here."""
    versions = {"python": platform.python_version(), "oar_scale": __version__}
    for name in machine.PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    checks = {"devices": machine.devices, "/dev/shm": places.shared_memory}
    if recipe is not None:
        checks |= {
            "run_dir": partial(places.disk, recipe.local_dir),
            "storage root": partial(places.storage_root, recipe.root),
            "storage speed": partial(places.storage_speed, recipe.root),
            "W&B": partial(places.weights_and_biases, recipe.observe.wandb),
            "W&B server": partial(places.wandb_server, recipe.observe.wandb),
        }
    return Facts(node, versions, [finding for item, check in checks.items() for finding in guarded(item, check)])


def between(place: Place, recipe: Recipe | None) -> list[Finding]:
    """Join the other workers and measure; rank 0 returns what was found, the others nothing."""
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{place.address}:{place.port}",
            rank=place.rank,
            world_size=place.world,
            timeout=datetime.timedelta(seconds=GROUP_S),
        )
    except (RuntimeError, ValueError) as error:
        remedy = "open the ports between the nodes, and name their interface in GLOO_SOCKET_IFNAME"
        found = Finding(
            "FAIL", "workers", f"{place.node} does not meet {place.world - 1} others at {place.address} ({first_line(error)}); {remedy}"
        )
        return [found]
    try:
        found_here = [*guarded("clocks", partial(_clocks, place)), *guarded("all-reduce", partial(_all_reduce, place))]
        if recipe is not None:
            found_here += guarded("shared storage", partial(_shared_storage, place, recipe.root))
        return found_here if place.rank == 0 else []
    finally:
        dist.destroy_process_group()


def merged(facts: Sequence[Facts]) -> Iterator[Finding]:
    """One line for each item: what all say, or who says what."""
    different = {}
    for name in dict.fromkeys(name for each in facts for name in each.versions):
        by_version = _grouped([(each.versions.get(name, "not installed"), each.node) for each in facts])
        if len(by_version) > 1:
            different[name] = by_version
    for name, by_version in different.items():
        yield Finding("FAIL", name, f"{_by_node(by_version)}; let all nodes use one image or environment")
    if not different and facts:
        shown = ", ".join(f"{name} {version}" for name, version in facts[0].versions.items())
        yield Finding("ok", "versions", f"{shown} on {_nodes([each.node for each in facts])}")
    for item in dict.fromkeys(finding.item for each in facts for finding in each.findings):
        said = [(finding, each.node) for each in facts for finding in each.findings if finding.item == item]
        worst = max((finding.status for finding, _ in said), key=["ok", "warn", "FAIL"].index)
        yield Finding(worst, item, _by_node(_grouped([(finding.text, node) for finding, node in said])))


def _clocks(place: Place) -> Iterator[Finding]:
    """Each node's clock against that of rank 0: half the way there and back, of the quickest of some rounds."""
    import torch
    import torch.distributed as dist

    offset, quickest = 0.0, float("inf")
    stamp = torch.zeros(1, dtype=torch.float64)
    for other in range(1, place.world):
        for _ in range(ROUNDS):
            if place.rank == other:
                sent = time.time()
                dist.send(torch.tensor([sent], dtype=torch.float64), 0)
                dist.recv(stamp, 0)
                back = time.time()
                if back - sent < quickest:
                    offset, quickest = (sent + back) / 2 - float(stamp), back - sent
            elif place.rank == 0:
                dist.recv(stamp, other)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), other)
    offsets = _gathered((place.node, offset))
    node, worst = max(offsets, key=lambda each: abs(each[1]))
    if abs(worst) > SKEW_S:
        text = f"{node} is {worst:+.1f} s off {place.node}; let all nodes ask the same time server (chrony)"
        yield Finding("warn", "clocks", text)
    else:
        yield Finding("ok", "clocks", f"within {1000 * abs(worst):.2f} ms of one another")


def _all_reduce(place: Place) -> Iterator[Finding]:
    """Bus bandwidth of a large sum, as NCCL's own tests count it: 2 (n - 1) / n of the bytes, over the time."""
    import torch
    import torch.distributed as dist

    if place.world == 1:
        yield Finding("ok", "all-reduce", "one worker, nobody to talk to")
        return
    backend = "nccl" if all(_gathered(place.gpu is not None)) else "gloo"
    device = torch.device("cuda", place.gpu or 0) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = dist.new_group(backend=backend, timeout=datetime.timedelta(seconds=GROUP_S))
    megabytes = 256 if backend == "nccl" else 32
    numbers = torch.ones(megabytes * 10**6 // 4, device=device)
    seconds = [_timed(numbers, device, group) for _ in range(ROUNDS)][1:]  # the first one opens the connections
    if not bool((numbers == place.world).all()):
        text = f"{backend} between {place.world} workers gives wrong sums; check the memory and the network of the nodes"
        yield Finding("FAIL", "all-reduce", text)
        return
    rate = 2 * (place.world - 1) / place.world * megabytes / 1000 / min(seconds)
    text = f"{rate:.2g} GB/s, {backend} between {place.world} workers ({megabytes} MB)"
    if rate < SLOW_GB_S[backend]:
        remedy = f"name the fast interface in {backend.upper()}_SOCKET_IFNAME"
        yield Finding("warn", "all-reduce", f"{text}, slow; {remedy}, and see what NCCL_DEBUG=INFO tells of its choice")
    else:
        yield Finding("ok", "all-reduce", text)


def _timed(numbers: torch.Tensor, device: torch.device, group: Any) -> float:
    import torch
    import torch.distributed as dist

    numbers.fill_(1)
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(numbers, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _shared_storage(place: Place, root: str) -> Iterator[Finding]:
    """Whether the nodes see what one of them writes. Nobody leaves on an error of its own before all have been told: they would wait."""
    remedy = "set storage.root to s3://BUCKET/PREFIX or to a file system that all nodes have"
    with ExitStack() as after:
        name, problem = _gathered(_tried(partial(_written, place, root, after)))[0]
        if name is None:
            yield Finding("FAIL", "shared storage", f"{root}: {place.node} cannot write there ({problem}); {remedy}")
            return
        looks = _gathered((place.node, *_tried(partial(_sees, root, name))))
    _gathered(None)  # the object is gone: now who made its folder can remove it
    problems = list(dict.fromkeys(problem for _, _, problem in looks if problem))
    if blind := sorted({node for node, seen, _ in looks if not seen}):
        text = f"{root}: what {place.node} writes is not seen on {_nodes(blind)}{f' ({problems[0]})' if problems else ''}"
        yield Finding("FAIL", "shared storage", f"{text}; {remedy}")
    else:
        yield Finding("ok", "shared storage", f"{root}: all nodes see what one writes")


def _written(place: Place, root: str, after: ExitStack) -> str:
    """The name of the object that rank 0 has written, and takes away afterwards; the others write none."""
    from oar_scale.storage import open_storage

    if place.rank != 0:
        return ""
    storage, uri = open_storage(root), places.own_object(root)
    storage.write(uri, b"seen?")
    after.callback(storage.delete, uri)
    return uri.rpartition("/")[2]


def _sees(root: str, name: str) -> bool:
    from oar_scale.storage import join, open_storage

    return open_storage(root).exists(join(root, name))


def _tried(action: Callable[[], T]) -> tuple[T | None, str]:
    """What comes of it, and what went wrong."""
    try:
        return action(), ""
    except Exception as error:  # whatever it is, it is told to all
        return None, first_line(error)


def _gathered(value: Any) -> list[Any]:
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _grouped(said: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for text, node in said:
        groups.setdefault(text, []).append(node)
    return groups


def _by_node(groups: dict[str, list[str]]) -> str:
    if len(groups) == 1:
        (text, nodes), *_ = groups.items()
        return text if len(nodes) == 1 else f"{text} (on {_nodes(nodes)})"
    return " | ".join(f"{_nodes(nodes)}: {text}" for text, nodes in groups.items())


def _nodes(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names) if len(names) <= NAMED else f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more nodes"
