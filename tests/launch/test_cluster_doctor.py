"""The doctor of a real Ray and of a real Slurm: what it asks of the scheduler, of each node, and what it measures between them."""

from __future__ import annotations

import http.server
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launcher import PORTS, run_workers
from test_ray_jobs import jobs_known, oar, profile

from cluster.dev import processes
from cluster.dev import ray as dev_ray
from cluster.dev import slurm as dev_slurm
from oar_scale.cli import main
from oar_scale.config.loading import load_recipe
from oar_scale.doctor import node_checks, storage_checks
from oar_scale.doctor.finding import Finding
from oar_scale.doctor.node_checks import NodeReport, merge_node_reports
from oar_scale.doctor.storage_checks import storage_speed, wandb_server
from oar_scale.launch import cluster_doctor as doctor
from oar_scale.launch import probe

ROOT = Path(__file__).resolve().parents[2]


def recipe(folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(f"name: doctored\nrun_dir: {folder}/run\n")
    return str(path)


def by_item(lines: str) -> dict[str, str]:
    return {line[5:].partition(": ")[0]: line[:5].strip() + " " + line.partition(": ")[2] for line in lines.splitlines()}


def check_measured(findings: dict[str, str], nodes: list[str]) -> None:
    assert findings["versions"].startswith("ok python ") and all(node in findings["versions"] for node in nodes)
    assert re.fullmatch(r"ok within [\d.]+ ms of one another", findings["clocks"])
    assert re.fullmatch(r"\w+ [\d.]+ GB/s, gloo between 2 workers \(32 MB\).*", findings["all-reduce"])
    assert findings["shared storage"].startswith("ok ") and "a second writer of the same object is refused" in findings["storage speed"]
    assert findings["W&B"].startswith("ok off") and "GiB free" in findings["run_dir"] and findings["devices"].startswith("ok no GPU")


def test_a_ray_cluster_is_examined_by_a_job_that_leaves_nothing(ray_cluster: dev_ray.Cluster, tmp_path: Path) -> None:
    findings = by_item(oar(ray_cluster, "doctor", recipe(tmp_path), "--cluster", profile(tmp_path, ray_cluster, gpu_type="H100")))
    check_measured(findings, [ray_cluster.nodes[0].address, ray_cluster.nodes[-1].address])
    assert findings["nodes"] == "ok 2 alive, 2 CPUs, 0 GPUs"
    assert findings["GPU type"].startswith("warn no node has one of type H100")
    assert "oar-doctor" not in jobs_known(ray_cluster)
    assert not (tmp_path / "run").exists()


def test_a_slurm_is_examined_by_a_step_that_leaves_nothing(
    slurm: dev_slurm.Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dev = str(ROOT / "cluster" / "slurm" / "dev.yaml")
    overrides = ["-p", "nodes=2", "-p", "cpus_per_node=1", "-p", "sbatch=['--export=NONE', '--open-mode=append']"]
    assert main(["doctor", recipe(tmp_path), "--cluster", dev, *overrides]) == 0
    findings = by_item(capsys.readouterr().out)
    check_measured(findings, ["n1", "n2"])
    assert "partition main" in findings["scheduler"]
    assert "oar-doctor" not in slurm.command("squeue", "-h", "--format=%j", "--states=PENDING,RUNNING")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("partition=gone", "Partitions here: main"),
        ("time='9-00:00:00'", "Limits here"),
        ("nodes=3", "Change nodes"),
        ("setup=[exit 3]", "the line `exit 3` of setup in the profile ended with code 3"),
        ("setup=[module load no-such-module]", "n1: the line `module load no-such-module` of setup in the profile ended with code 127"),
    ],
)
def test_what_slurm_would_refuse_is_reported_with_the_remedy(
    wrong: str, message: str, slurm: dev_slurm.Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    dev = str(ROOT / "cluster" / "slurm" / "dev.yaml")
    assert main(["doctor", "--cluster", dev, "-p", "cpus_per_node=1", "-p", wrong]) == 1
    shown = capsys.readouterr().out
    assert "FAIL" in shown and message in shown, shown


def test_a_check_that_takes_too_long_leaves_no_allocation(
    slurm: dev_slurm.Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECK_S", 2)  # beside start_s, at least 10 s: time enough to get an allocation
    dev = str(ROOT / "cluster" / "slurm" / "dev.yaml")
    overrides = ["cpus_per_node=1", "start_s=10", "setup=['sleep 600']"]
    assert main(["doctor", "--cluster", dev, *(word for each in overrides for word in ("-p", each))]) == 1
    assert "the check on the nodes takes longer than 12 s" in capsys.readouterr().out
    assert "oar-doctor" not in slurm.command("squeue", "-h", "--format=%j", "--states=PENDING,RUNNING")
    assert "oar-doctor" in slurm.command("squeue", "-h", "--format=%j", "--states=all"), "it had none"


def test_workers_do_not_wait_long_for_one_that_gave_up(
    slurm: dev_slurm.Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PARTING_S", 2)
    dev = str(ROOT / "cluster" / "slurm" / "dev.yaml")
    wrong = "setup=['[ $SLURM_PROCID = 1 ] || exit 3']"
    assert main(["doctor", "--cluster", dev, "-p", "cpus_per_node=1", "-p", wrong]) == 1
    shown = capsys.readouterr().out
    assert re.search("FAIL workers: (1 of 2 nodes|no node) answered", shown)
    assert "does not meet" not in shown  # what a worker says that has waited for all of the process group's time limit


def test_a_cluster_that_is_not_there_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nobody = dev_ray.Cluster("", "", dev_ray.free_port(), True, "")
    assert main(["doctor", "--cluster", profile(tmp_path, nobody)]) == 2
    assert "no Ray answers there" in capsys.readouterr().err


def test_nodes_that_differ_are_named_and_equal_ones_are_one_line() -> None:
    same = Finding("ok", "devices", "8 GPUs")
    reports = [NodeReport(f"n{i}", {"torch": "2.15.0", "ray": "2.60.0"}, [same]) for i in range(6)]
    lines = [str(finding) for finding in merge_node_reports(reports)]
    assert lines == [
        "ok   versions: torch 2.15.0, ray 2.60.0 on n0, n1, n2 and 3 more nodes",
        "ok   devices: 8 GPUs (on n0, n1, n2 and 3 more nodes)",
    ]
    odd = NodeReport("n6", {"torch": "2.14.1", "ray": "2.60.0"}, [Finding("warn", "devices", "no GPU")])
    lines = [str(finding) for finding in merge_node_reports([*reports, odd])]
    assert lines[0] == "FAIL torch: n0, n1, n2 and 3 more nodes: 2.15.0 | n6: 2.14.1; let all nodes use one image or environment"
    assert lines[1] == "warn devices: n0, n1, n2 and 3 more nodes: 8 GPUs | n6: no GPU"


def printed(records: list[dict[str, Any]], task: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    probe._print_lines(records, task)
    return capsys.readouterr().out.splitlines()


def test_long_results_of_tasks_that_print_at_once_arrive_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """srun splits lines of 1,024 bytes and more, and mixes them with those of other tasks."""
    long = [NodeReport(f"n{i}", {}, [Finding("warn", "GPU link", f"\u00e9 {i} " * 400)]) for i in range(2)]
    between = Finding("ok", "clocks", "within 0.1 ms of one another")
    lines = [printed([report.plain(), vars(between)], task, capsys) for task, report in enumerate(long)]
    assert len(lines[0]) > 4 and max(len(line.encode()) for line in lines[0]) < 1024
    mixed = "\n".join(line for both in zip(*lines, strict=True) for line in both)
    assert probe.parse_findings(f"a warning of a library\n{mixed}\n") == (long, [between, between])


@pytest.mark.parametrize("line", ['OAR-DOCTOR 0 . {"status": "ok", "it', "OAR-DOCTOR 0 . {}", "OAR-DOCTOR", "OAR-DOCTOR ", "OAR-DOCTOR 1"])
def test_a_damaged_result_is_a_finding(line: str) -> None:
    good = Finding("ok", "clocks", "fine")
    log = f"{line}\n{probe.MARK}1 . {json.dumps(vars(good))}\n"
    assert probe.parse_findings(log)[1][-1] == good
    damaged = probe.parse_findings(log)[1][:-1]
    assert [(each.status, each.item) for each in damaged] == [("FAIL", "workers")] * line.startswith(probe.MARK)


def join_group(port: int, late_s: float, recipes: list[str], out: str) -> None:
    """One of two workers; the second one's clock is wrong."""
    node_checks.GROUP_S = 3600.0  # a worker that waited for this would outlast the test
    rank = int(os.environ["RANK"])
    if rank == 1:
        now = time.time
        time.time = lambda: now() + late_s  # of this process
    info = node_checks.RankInfo(f"n{rank}", rank, 2, 0, "127.0.0.1", port)
    findings = node_checks.check_between_nodes(info, load_recipe(recipes[rank]))
    Path(out, f"findings-{rank}").write_text("\n".join(map(str, findings)))


def between_two(late_s: float, recipes: list[str], out: Path) -> list[str]:
    """What each of two workers says."""
    port = processes.free_port(PORTS, lambda port: [port])
    run_workers(join_group, 2, port, late_s, recipes, str(out))
    return [(out / f"findings-{rank}").read_text() for rank in range(2)]


def test_a_wrong_clock_and_a_storage_not_shared_are_reported(tmp_path: Path) -> None:
    recipes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        recipes.append(recipe(tmp_path / name))
    findings, other = between_two(3, recipes, tmp_path)
    assert other == ""
    off = re.search(r"warn clocks: n1 is ([+-][\d.]+) s off n0", findings)
    assert off is not None and float(off[1]) == pytest.approx(3, abs=0.5)
    assert "what n0 writes is not seen on n1" in findings and "set storage.root to s3://" in findings


def test_a_storage_that_cannot_be_written_is_reported_at_once(tmp_path: Path) -> None:
    """A file where the folder should be stops root as well."""
    (tmp_path / "run").touch()
    findings, other = between_two(0, [recipe(tmp_path)] * 2, tmp_path)
    assert other == ""
    assert f"FAIL shared storage: {tmp_path}/run: n0 cannot write there (UserError: {tmp_path}/run/" in findings
    assert "set storage.root to s3://" in findings


def test_storage_is_timed_and_a_second_writer_refused(s3_root: str) -> None:
    (findings,) = storage_speed(s3_root, megabytes=2)
    assert findings.status == "ok" and re.fullmatch(r"wrote \d+ MB/s, read \d+ MB/s; a second writer .* is refused", findings.text)


@pytest.fixture
def server() -> Iterator[str]:
    """Somebody who answers, if only that there is nothing."""
    http_server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}"
    http_server.shutdown()
    http_server.server_close()


def test_a_wandb_server_is_asked_only_where_runs_are_online(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def at(url: str) -> Any:
        return type("Setup", (), {"settings": type("Settings", (), {"base_url": url})})

    monkeypatch.setattr(storage_checks, "SERVER_TIMEOUT_S", 60.0)
    monkeypatch.setattr(wandb, "setup", lambda: at(server))
    assert [finding.status for finding in wandb_server("online")] == ["ok"]
    monkeypatch.setattr(wandb, "setup", lambda: at("http://127.0.0.1:9"))
    assert [finding.status for finding in wandb_server("online")] == ["warn"]
    assert not list(wandb_server("offline"))
