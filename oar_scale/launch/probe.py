"""What ``oar doctor --cluster`` runs on the cluster. It prints each result as lines that begin with ``OAR-DOCTOR``.

    srun ... python -m oar_scale.launch.probe slurm     in each task, with MASTER_ADDR set: a task is a worker
    python -m oar_scale.launch.probe ray                as a Ray job: starts a worker on each node, for each GPU where there are any

OAR_RECIPE holds the recipe's text, if there is one.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from oar_scale.config.loading import load_recipe
from oar_scale.doctor.finding import Finding
from oar_scale.doctor.node_checks import GROUP_S, NodeReport, RankInfo, check_between_nodes, node_report
from oar_scale.doctor.storage_checks import remove_created_folders
from oar_scale.errors import error_line
from oar_scale.json_object import JsonObject, parse_object
from oar_scale.launch.ray_entry import RECIPE
from oar_scale.runtime.program import program_exit

if TYPE_CHECKING:
    from oar_scale.config.schema import Recipe

MARK = "OAR-DOCTOR "
PIECE = 800
"""Characters of a result in a line: srun passes lines on whole up to 1,024 bytes; longer ones it may mix with those of other tasks."""
MORE, LAST = "+", "."
NODES = "nodes"
PARTING_S = 30
"""Time left to the other workers once the first one has ended: they would wait for a worker that has failed at once."""


def main(kind: str) -> int:
    """Check the node of a Slurm task, or all nodes of a Ray cluster; ``kind`` is ``slurm`` or ``ray``."""
    if kind == "slurm":
        _in_task(os.environ)
    else:
        _on_ray()
    return 0


def parse_findings(log: str) -> tuple[list[NodeReport], list[Finding]]:
    """Read the probe's lines in a log: the reports of the nodes, and the findings between the nodes."""
    reports, findings = [], []
    begun: dict[str, str] = {}
    for line in log.splitlines():
        _, mark, text = line.partition(MARK)
        if not mark:
            continue
        task, more, piece = (*text.split(" ", 2), "", "")[:3]
        begun[task] = begun.get(task, "") + piece
        if more == MORE:
            continue
        try:
            record = parse_object(begun.pop(task))
            if "node" in record:
                reports.append(NodeReport.of(record))
            else:
                findings.append(Finding(**record))
        except (ValueError, TypeError, KeyError):
            findings.append(Finding("FAIL", "workers", f"a result of the check arrived damaged ({line[:200]}); run it again"))
    return reports, findings


def _in_task(env: os._Environ[str]) -> None:
    rank, local = int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"])
    recipe, node = _recipe(), env.get("SLURMD_NODENAME", socket.gethostname())
    with remove_created_folders(recipe.root if recipe else None):
        if local == 0:
            _print_lines([node_report(node, recipe).plain()], rank)
        info = RankInfo(node, rank, int(env["SLURM_NTASKS"]), local, env["MASTER_ADDR"], int(env["MASTER_PORT"]), _gpu(local))
        _print_lines([vars(finding) for finding in check_between_nodes(info, recipe)], rank)


def _on_ray() -> None:
    from oar_scale.runtime.ray_session import ray_session

    with ray_session(cpus=1):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes}
        _print_lines([vars(_cluster_resources(nodes))])
        remote: Any = ray.remote(_Probe)
        actors, homes = [], []
        for node in nodes:
            options = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False), "num_cpus": 0}
            for _ in range(max(1, gpus[node["NodeID"]])):
                options["num_gpus"] = int(gpus[node["NodeID"]] > 0)
                actors.append(remote.options(**options).remote(node["NodeManagerAddress"]))
                homes.append(node["NodeID"])
        firsts = [actor for index, actor in enumerate(actors) if homes.index(homes[index]) == index]
        try:
            _print_lines(ray.get([actor.report.remote() for actor in firsts], timeout=GROUP_S))
            workers = [actor for actor, home in zip(actors, homes, strict=True) if gpus[home] or not any(gpus.values())]
            local = [sum(home == other for other in homes[:index]) for index, home in enumerate(homes)]
            local_ranks = [local[actors.index(actor)] for actor in workers]
            address, port = ray.get(workers[0].free_address.remote(), timeout=GROUP_S)
            joined = [actor.join.remote(rank, len(workers), local_ranks[rank], address, port) for rank, actor in enumerate(workers)]
            first, _ = ray.wait(joined, timeout=2 * GROUP_S)
            ended, _ = ray.wait(joined, num_returns=len(joined), timeout=PARTING_S if first else 0)
            _print_lines([finding for each in ray.get(ended or joined, timeout=1) for finding in each])
        except ray.exceptions.RayError as error:
            text = f"the check did not finish ({error_line(error)}); are GPUs of a node in use, or is one dying? ray status"
            _print_lines([vars(Finding("FAIL", "workers", text))])
        finally:
            with suppress(ray.exceptions.RayError):  # a worker that hangs or is gone leaves its folder behind
                ray.get([actor.clean_up.remote() for actor in firsts], timeout=PARTING_S)


class _Probe:
    """A Ray actor on a node, which checks it and takes part in the measurements between nodes."""

    def __init__(self, node: str) -> None:
        self._node, self._recipe, self._cleanup = node, _recipe(), ExitStack()

    def report(self) -> JsonObject:
        self._cleanup.enter_context(remove_created_folders(self._recipe.root if self._recipe else None))
        return node_report(self._node, self._recipe).plain()

    def free_address(self) -> tuple[str, int]:
        with socket.create_server((self._node, 0)) as probe:
            return self._node, int(probe.getsockname()[1])

    def join(self, rank: int, world: int, local_rank: int, address: str, port: int) -> list[JsonObject]:
        info = RankInfo(self._node, rank, world, local_rank, address, port, _gpu(0))
        return [vars(finding) for finding in check_between_nodes(info, self._recipe)]

    def clean_up(self) -> None:
        """Remove the folders that :meth:`report` has made; called when all workers have joined."""
        self._cleanup.close()


def _cluster_resources(nodes: Sequence[JsonObject]) -> Finding:
    total: dict[str, float] = {}
    for node in nodes:
        for name, count in node["Resources"].items():
            total[name] = total.get(name, 0) + count
    types = sorted(name.partition(":")[2] for name in total if name.startswith("accelerator_type:"))
    text = f"{len(nodes)} alive, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs{f' ({chr(44).join(types)})' if types else ''}"
    return Finding("ok", NODES, text)


def _gpu(local_rank: int) -> int | None:
    import torch

    return local_rank % torch.cuda.device_count() if torch.cuda.is_available() else None


def _recipe() -> Recipe | None:
    text = os.environ.get(RECIPE)
    if not text:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return load_recipe(file.name)


def _print_lines(records: Sequence[JsonObject], task: int = 0) -> None:
    for record in records:
        text = json.dumps(record)
        for start in range(0, len(text), PIECE):
            more = MORE if start + PIECE < len(text) else LAST
            sys.stdout.write(f"{MARK}{task} {more} {text[start : start + PIECE]}\n")  # in one write, since other tasks print as well
    sys.stdout.flush()


if __name__ == "__main__":
    with program_exit():
        sys.exit(main(sys.argv[1]))
