"""What Slurm refuses: its words, the remedy, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.dev import slurm as dev_slurm
from cluster.dev.slurm import Cluster
from oar_scale.cli import main

ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "recipes" / "smoke.yaml")


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *words: str, **profile: Any) -> str:
    """What ``oar submit`` says."""
    given = {"type": "slurm", "partition": "main", "cpus_per_node": 1, "time": "00:05:00", "warn_s": 30, **profile}
    path = folder / "profile.yaml"
    path.write_text(json.dumps(given))
    before = sorted(folder.rglob("*"))
    assert main(["submit", SMOKE, "--cluster", str(path), "-o", f"run_dir={folder}/runs/new", *words]) == 2
    assert sorted(folder.rglob("*")) == before, "something was left behind"
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("profile", "words", "remedy"),
    [
        ({"partition": "gpu"}, "invalid partition specified: gpu", "Partitions here: main; preempt; high. Set `partition`"),
        ({"time": "9-00:00:00"}, "Requested time limit is invalid", "Limits here: main 1-00:00:00; preempt infinite"),
        ({"gpus_per_node": 17}, "node configuration is not available", "main: 2 nodes of 16 CPUs"),
        ({"nodes": 3}, "node", "Change nodes, cpus_per_node"),
        ({"cpus_per_node": 200}, "", "Change nodes, cpus_per_node"),
        ({"sbatch": ["--no-such-option"]}, "unrecognized option", ""),
    ],
    ids=["partition", "time", "gpus", "nodes", "cpus", "option"],
)
def test_slurm_says_no_and_the_remedy_follows(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], profile: dict[str, Any], words: str, remedy: str
) -> None:
    said = refused(tmp_path, capsys, **profile)
    assert words in said and remedy in said and "Traceback" not in said
    assert str(tmp_path) not in slurm.command("squeue", "--noheader", "--format=%o")


def test_a_chain_is_submitted_whole_or_not_at_all(slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(tmp_path, capsys, "--stages", "data,tokens", stages={"tokens": {"partition": "gpu"}})
    assert "the job tokens: " in said and "invalid partition" in said
    queued = slurm.command("squeue", "--noheader", "--states=PENDING,RUNNING", "--format=%o")
    assert str(tmp_path) not in queued


def test_a_second_submission_that_is_refused_leaves_the_first_alone(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "jobs").mkdir(parents=True)
    (run / "jobs.json").write_text("[]\n")
    (tmp_path / "profile.yaml").write_text('{"type": "slurm", "partition": "gpu", "cpus_per_node": 1, "time": "00:10:00"}')
    assert main(["submit", SMOKE, "--cluster", str(tmp_path / "profile.yaml"), "-o", f"run_dir={run}"]) == 2
    assert (run / "jobs.json").read_text() == "[]\n"
    assert [path.name for path in (run / "jobs").iterdir()] == [".lock"]


def test_a_head_that_does_not_answer_is_named(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = Path(slurm.env["SLURM_CONF"]).read_text()
    dead = tmp_path.parent / f"{tmp_path.name}-dead.conf"
    dead.write_text(conf.replace(f"SlurmctldPort={slurm.port}", f"SlurmctldPort={dev_slurm.free_port()}") + "MessageTimeout=2\n")
    monkeypatch.setenv("SLURM_CONF", str(dead))
    said = refused(tmp_path, capsys)
    assert "Unable to contact slurm controller" in said and "slurmctld up (scontrol ping)" in said


def test_a_machine_without_slurm_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no program sbatch on this machine" in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "a quota"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "Set `account` and `qos`"),
        ("Batch job submission failed: Invalid qos specification", "Set `account` and `qos`"),
        ("Batch job submission failed: Requested GRES option unsupported by configured SelectType plugin", "gpu_type or memory_gb"),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", "slurmctld up"),
    ],
)
def test_what_only_a_site_with_accounts_refuses_has_its_remedy_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str, remedy: str
) -> None:
    """The words are Slurm's; a script says them."""
    fake(tmp_path, monkeypatch, sbatch=f"echo 'sbatch: error: {words.replace(chr(39), '’')}' >&2; exit 1", sinfo="echo gpu")
    said = refused(tmp_path, capsys)
    assert "sbatch refuses the job run: Batch job submission failed" in said
    assert remedy in said


@pytest.mark.parametrize("reason", ["PartitionTimeLimit", "AssocMaxWallDurationPerJobLimit", "QOSMaxGRESPerJob", "InvalidAccount"])
def test_a_job_that_a_cluster_accepts_but_could_never_start_is_taken_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    taken = tmp_path.parent / f"{tmp_path.name}-taken"
    fake(tmp_path, monkeypatch, sbatch="echo 7", squeue=f"echo {reason}", scancel=f"echo $* > {taken}", sinfo="echo gpu")
    said = refused(tmp_path, capsys)
    assert f"the job run could never start: {reason}" in said and taken.read_text() == "7\n"


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    (folder / "bin").mkdir()
    for name, body in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:/bin:/usr/bin")
