"""Checks that need several nodes: equal versions, equal clocks, storage that all of them share, the network between them.

with remove_created_folders(root):                  around all of it, on every node
    report = node_report(name, recipe)               on each node
    findings = check_between_nodes(rank_info, recipe)    in each worker, all at once; rank 0 gets the answer
merge_node_reports(all reports)                       where they are collected: one line an item, however many nodes
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
from oar_scale.doctor import machine, network, storage_checks
from oar_scale.doctor.finding import Finding, guarded
from oar_scale.errors import error_line
from oar_scale.json_object import JsonObject

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from oar_scale.config.schema import Recipe

T = TypeVar("T")
GROUP_S = 120.0
SKEW_S = 1.0
"""More than this confuses logs, and S3 refuses requests that are minutes off."""
ROUNDS = 5
NAMED = 3
"""Nodes named in a line."""


@dataclass(frozen=True)
class NodeReport:
    """Versions and findings of one node, as it reports them."""

    node: str
    versions: dict[str, str]
    findings: list[Finding]

    def plain(self) -> JsonObject:
        """The same as plain dictionaries and lists, for JSON; :meth:`of` reads them."""
        return asdict(self)

    @staticmethod
    def of(plain: JsonObject) -> NodeReport:
        """The report that :meth:`plain` wrote."""
        return NodeReport(plain["node"], plain["versions"], [Finding(**finding) for finding in plain["findings"]])


@dataclass(frozen=True)
class RankInfo:
    """Rank and address of a worker in the process group of the checks."""

    node: str
    rank: int
    world: int
    local_rank: int
    address: str
    port: int
    gpu: int | None = field(default=None)
    """Index of its GPU, as this process sees them."""


def node_report(node: str, recipe: Recipe | None) -> NodeReport:
    """Versions and devices of this node and, with a recipe, its disk, storage and W&B as seen from here."""
    versions = {"python": platform.python_version(), "oar_scale": __version__}
    for name in machine.PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    checks = {
        "devices": machine.devices,
        "CUDA toolkit": machine.cuda_toolkit,
        "network": network.locked_memory,
        "/dev/shm": storage_checks.shared_memory,
    }
    if recipe is not None:
        checks |= {
            "run_dir": partial(storage_checks.disk, recipe.local_dir),
            "storage root": partial(storage_checks.storage_root, recipe.root),
            "storage speed": partial(storage_checks.storage_speed, recipe.root),
            "W&B": partial(storage_checks.weights_and_biases, recipe.observe.wandb),
            "W&B server": partial(storage_checks.wandb_server, recipe.observe.wandb),
        }
    return NodeReport(node, versions, [finding for item, check in checks.items() for finding in guarded(item, check)])


def check_between_nodes(rank_info: RankInfo, recipe: Recipe | None) -> list[Finding]:
    """Join the process group of all workers, compare clocks, time an all-reduce and try the shared storage.

    Returns:
        the findings on rank 0; an empty list on the other ranks (a worker that cannot join reports that itself).
    """
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{rank_info.address}:{rank_info.port}",
            rank=rank_info.rank,
            world_size=rank_info.world,
            timeout=datetime.timedelta(seconds=GROUP_S),
        )
    except (RuntimeError, ValueError) as error:
        remedy = "open the ports between the nodes, and name their interface in GLOO_SOCKET_IFNAME"
        others = f"{rank_info.world - 1} others at {rank_info.address}"
        return [Finding("FAIL", "workers", f"{rank_info.node} does not meet {others} ({error_line(error)}); {remedy}")]
    try:
        findings = [*guarded("clocks", partial(_clocks, rank_info)), *guarded("all-reduce", partial(_all_reduce, rank_info))]
        if recipe is not None:
            findings += guarded("shared storage", partial(_shared_storage, rank_info, recipe.root))
        return findings if rank_info.rank == 0 else []
    finally:
        dist.destroy_process_group()


def merge_node_reports(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """One finding for each item: its text where all nodes agree, else which node reports what. The worst status counts."""
    different = {}
    for name in dict.fromkeys(name for each in reports for name in each.versions):
        by_version = _grouped([(each.versions.get(name, "not installed"), each.node) for each in reports])
        if len(by_version) > 1:
            different[name] = by_version
    for name, by_version in different.items():
        yield Finding("FAIL", name, f"{_by_node(by_version)}; let all nodes use one image or environment")
    if not different and reports:
        shown = ", ".join(f"{name} {version}" for name, version in reports[0].versions.items())
        yield Finding("ok", "versions", f"{shown} on {_nodes([each.node for each in reports])}")
    for item in dict.fromkeys(finding.item for each in reports for finding in each.findings):
        reported = [(finding, each.node) for each in reports for finding in each.findings if finding.item == item]
        worst = max((finding.status for finding, _ in reported), key=["ok", "warn", "FAIL"].index)
        yield Finding(worst, item, _by_node(_grouped([(finding.text, node) for finding, node in reported])))


def _clocks(rank_info: RankInfo) -> Iterator[Finding]:
    """Compare each node's clock with that of rank 0, corrected by half the round-trip time of the quickest of some rounds."""
    import torch
    import torch.distributed as dist

    offset, quickest = 0.0, float("inf")
    stamp = torch.zeros(1, dtype=torch.float64)
    for other in range(1, rank_info.world):
        for _ in range(ROUNDS):
            if rank_info.rank == other:
                sent = time.time()
                dist.send(torch.tensor([sent], dtype=torch.float64), 0)
                dist.recv(stamp, 0)
                back = time.time()
                if back - sent < quickest:
                    offset, quickest = (sent + back) / 2 - float(stamp), back - sent
            elif rank_info.rank == 0:
                dist.recv(stamp, other)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), other)
    offsets = _gathered((rank_info.node, offset))
    node, worst = max(offsets, key=lambda each: abs(each[1]))
    if abs(worst) > SKEW_S:
        text = f"{node} is {worst:+.1f} s off {rank_info.node}; let all nodes ask the same time server (chrony)"
        yield Finding("warn", "clocks", text)
    else:
        yield Finding("ok", "clocks", f"within {1000 * abs(worst):.2f} ms of one another")


def _all_reduce(rank_info: RankInfo) -> Iterator[Finding]:
    """Bus bandwidth of a large sum, as NCCL's own tests count it: 2 (n - 1) / n of the bytes, over the time."""
    import torch
    import torch.distributed as dist

    if rank_info.world == 1:
        yield Finding("ok", "all-reduce", "one worker, nothing to measure")
        return
    backend = "nccl" if all(_gathered(rank_info.gpu is not None)) else "gloo"
    device = torch.device("cuda", rank_info.gpu or 0) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = dist.new_group(backend=backend, timeout=datetime.timedelta(seconds=GROUP_S))
    assert not isinstance(group, int), "every rank is a member"
    megabytes = 256 if backend == "nccl" else 32
    numbers = torch.ones(megabytes * 10**6 // 4, device=device)
    with network.nccl_choice() as chosen:
        seconds = [_timed(numbers, device, group) for _ in range(ROUNDS)][1:]  # the first one opens the connections
    nodes = dict(_gathered((rank_info.node, network.links_of_node())))
    if not bool((numbers == rank_info.world).all()):
        text = f"{backend} between {rank_info.world} workers gives wrong sums; check the memory and the network of the nodes"
        yield Finding("FAIL", "all-reduce", text)
        return
    rate = 2 * (rank_info.world - 1) / rank_info.world * megabytes / 1000 / min(seconds)
    over = f" over {chosen[0]}" if chosen else ""
    text = f"{rate:.2g} GB/s, {backend}{over} between {rank_info.world} workers ({megabytes} MB)"
    if fault := network.judge(rate, backend, chosen[0] if chosen else "", [*nodes.items()]):
        yield Finding("warn", "all-reduce", f"{text}; {fault}")
    else:
        yield Finding("ok", "all-reduce", text)


def _timed(numbers: torch.Tensor, device: torch.device, group: ProcessGroup) -> float:
    import torch
    import torch.distributed as dist

    numbers.fill_(1)
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(numbers, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _shared_storage(rank_info: RankInfo, root: str) -> Iterator[Finding]:
    """Whether all nodes see an object that rank 0 writes.

    An error is gathered like a result: a rank that raised it at once would leave the others waiting in their collective.
    """
    remedy = "set storage.root to s3://BUCKET/PREFIX or to a file system that all nodes have"
    with ExitStack() as after:
        name, problem = _gathered(_tried(partial(_written, rank_info, root, after)))[0]
        if name is None:
            yield Finding("FAIL", "shared storage", f"{root}: {rank_info.node} cannot write there ({problem}); {remedy}")
            return
        seen_by = _gathered((rank_info.node, *_tried(partial(_sees, root, name))))
    _gathered(None)  # the object is gone: now who made its folder can remove it
    problems = list(dict.fromkeys(problem for _, _, problem in seen_by if problem))
    if blind := sorted({node for node, seen, _ in seen_by if not seen}):
        text = f"{root}: what {rank_info.node} writes is not seen on {_nodes(blind)}{f' ({problems[0]})' if problems else ''}"
        yield Finding("FAIL", "shared storage", f"{text}; {remedy}")
    else:
        yield Finding("ok", "shared storage", f"{root}: all nodes see what one writes")


def _written(rank_info: RankInfo, root: str, after: ExitStack) -> str:
    """Write an object on rank 0, to be deleted when ``after`` closes, and return its name; the other ranks return an empty string."""
    from oar_scale.storage import open_storage

    if rank_info.rank != 0:
        return ""
    storage, uri = open_storage(root), storage_checks.own_object(root)
    storage.write(uri, b"seen?")
    after.callback(storage.delete, uri)
    return uri.rpartition("/")[2]


def _sees(root: str, name: str) -> bool:
    from oar_scale.storage import join, open_storage

    return open_storage(root).exists(join(root, name))


def _tried(action: Callable[[], T]) -> tuple[T | None, str]:
    """The result of an action and an empty text, or None and the first line of its error."""
    try:
        return action(), ""
    except Exception as error:  # whatever it is, all ranks get it
        return None, error_line(error)


def _gathered(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks (a collective)."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _grouped(texts: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """The nodes that report each text, from pairs (text, node)."""
    groups: dict[str, list[str]] = {}
    for text, node in texts:
        groups.setdefault(text, []).append(node)
    return groups


def _by_node(groups: dict[str, list[str]]) -> str:
    """One line about all nodes: the text that they share, or each text behind the nodes that report it."""
    if len(groups) == 1:
        (text, nodes), *_ = groups.items()
        return text if len(nodes) == 1 else f"{text} (on {_nodes(nodes)})"
    return " | ".join(f"{_nodes(nodes)}: {text}" for text, nodes in groups.items())


def _nodes(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    names = list(dict.fromkeys(names))
    return ", ".join(names) if len(names) <= NAMED else f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more nodes"
