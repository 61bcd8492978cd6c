"""What Slurm refuses: its message, the remedy, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.dev import slurm as dev_slurm
from cluster.dev.slurm import Cluster
from oar_scale.cli import main
from oar_scale.errors import UserError
from oar_scale.launch import cancel, find_jobs, logs
from oar_scale.launch.slurm import sbatch
from oar_scale.launch.submissions import last_submission

ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "recipes" / "smoke.yaml")


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, **profile: Any) -> str:
    """What ``oar submit`` says."""
    given = {"type": "slurm", "partition": "main", "cpus_per_node": 1, "time": "00:05:00", "warn_s": 30, **profile}
    path = folder / "profile.yaml"
    path.write_text(json.dumps(given))
    before = sorted(folder.rglob("*"))
    assert main(["submit", SMOKE, "--cluster", str(path), "-o", f"run_dir={folder}/runs/new", *arguments]) == 2
    assert sorted(folder.rglob("*")) == before, "something was left behind"
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("profile", "message", "remedy"),
    [
        ({"partition": "gpu"}, "invalid partition specified: gpu", "Partitions here: main; preempt; high. Set `partition`"),
        ({"time": "9-00:00:00"}, "Requested time limit is invalid", "Limits here: main 1-00:00:00; preempt infinite"),
        ({"gpus_per_node": 17}, "node configuration is not available", "main: 2 nodes of 16 CPUs"),
        ({"nodes": 3}, "node", "Change nodes, cpus_per_node"),
        ({"cpus_per_node": 200}, "", "Change nodes, cpus_per_node"),
        ({"sbatch": ["--no-such-option"]}, "unrecognized option", ""),
        ({"sbatch": ["--constraint=ib"]}, "Invalid feature specification", "Correct `--constraint`"),
        ({"sbatch": ["--exclude=elsewhere"]}, "Invalid node name specified", "Nodes here: n[1-2]. Correct `--exclude`"),
    ],
    ids=["partition", "time", "gpus", "nodes", "cpus", "option", "feature", "node"],
)
def test_slurm_says_no_and_the_remedy_follows(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], profile: dict[str, Any], message: str, remedy: str
) -> None:
    output = refused(tmp_path, capsys, **profile)
    assert message in output and remedy in output and "Traceback" not in output
    assert str(tmp_path) not in slurm.command("squeue", "--noheader", "--format=%o")


def test_an_array_above_the_clusters_limit_is_named(slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = refused(tmp_path, capsys, "--stages", "extract", stages={"extract": {"array": 5000}})
    assert "Invalid job array specification" in output
    assert "An array has at most 1001 tasks here (MaxArraySize of `scontrol show config`). Lower `stages.extract.array`" in output


def test_a_chain_is_submitted_whole_or_not_at_all(slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = refused(tmp_path, capsys, "--stages", "data,tokens", stages={"tokens": {"partition": "gpu"}})
    assert "the job tokens: " in output and "invalid partition" in output
    queued = slurm.command("squeue", "--noheader", "--states=PENDING,RUNNING", "--format=%o")
    assert str(tmp_path) not in queued


def test_a_refused_second_submission_leaves_the_first_alone(slurm: Cluster, tmp_path: Path) -> None:
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
    output = refused(tmp_path, capsys)
    assert "Unable to contact slurm controller" in output and "slurmctld up (scontrol ping)" in output


@pytest.mark.parametrize("printed", ["12", "12;here", "Welcome\n* 3 jobs left\n12;here\n", "12\nSee https://site/quota 99", "7\n12\n"])
def test_the_number_of_a_job_is_found_in_what_sbatch_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str) -> None:
    """Sites wrap it in scripts of their own."""
    fake(tmp_path, monkeypatch, sbatch=f"cat <<'END'\n{printed}\nEND")
    assert sbatch("job.sbatch", "pretrain") == "12"


def test_an_sbatch_that_prints_no_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, sbatch="echo Submitted batch job 12")
    with pytest.raises(UserError, match="no number of the job pretrain, but: 'Submitted batch job 12'"):
        sbatch("job.sbatch", "pretrain")


def test_jobs_for_another_cluster_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever that is said; the states of such jobs could not be asked for."""
    fake(tmp_path, monkeypatch, sbatch="echo 7", squeue="", sinfo="")
    for profile in ({"sbatch": ["--clusters=b"]}, {"stages": {"extract": {"sbatch": ["--clusters b"]}}}):
        assert "another cluster of a multi-cluster Slurm" in refused(tmp_path, capsys, **profile)
    assert "another cluster of a multi-cluster Slurm" in refused(tmp_path, capsys, "--dry-run", sbatch=["--clusters=b"])
    monkeypatch.setenv("SLURM_CLUSTERS", "b")
    assert "SLURM_CLUSTERS=b in this shell: jobs for another cluster" in refused(tmp_path, capsys)
    monkeypatch.delenv("SLURM_CLUSTERS")
    (tmp_path / "mine.yaml").write_text('{"type": "slurm", "cpus_per_node": 1, "time": "00:05:00", "sbatch": ["--cluster-constraint=x"]}')
    assert main(["submit", SMOKE, "--cluster", str(tmp_path / "mine.yaml"), "-o", f"run_dir={tmp_path}/run", "-p", "warn_s=30"]) == 0


def test_a_machine_without_slurm_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no program sbatch on this machine" in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "a quota"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "Set `account` and `qos`"),
        ("Batch job submission failed: Invalid qos specification", "Set `account` and `qos`"),
        ("Batch job submission failed: Requested GRES option unsupported by configured SelectType plugin", "gpu_type, memory_gb"),
        ("Batch job submission failed: Access/permission denied", "AllowGroups"),
        ("Batch job submission failed: Job's account not permitted to use this partition (gpu allows a not b)", "AllowAccounts"),
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", "slurmctld up"),
    ],
)
def test_refusals_of_sites_with_accounts_have_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, message: str, remedy: str
) -> None:
    """The messages are Slurm's; a script prints them."""
    fake(tmp_path, monkeypatch, sbatch=f"echo 'sbatch: error: {message.replace(chr(39), '’')}' >&2; exit 1", sinfo="echo gpu")
    output = refused(tmp_path, capsys)
    assert "sbatch refuses the job run: Batch job submission failed" in output
    assert remedy in output


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("PartitionTimeLimit", "Lower `time`"),
        ("PartitionNodeLimit", "Nodes of a job here: gpu. Change `nodes`"),
        ("AssocMaxWallDurationPerJobLimit", "a quota"),
        ("QOSMaxGRESPerJob", "a quota"),
        ("InvalidAccount", "Set `account` and `qos`"),
        ("AccountNotAllowed", "Set `account` and `qos`"),
        ("BadConstraints", "or `sbatch`"),
        ("DependencyNeverSatisfied", "Submit again"),
    ],
)
def test_a_job_that_could_never_start_is_taken_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, reason: str, remedy: str
) -> None:
    """At the first look Slurm has no reason yet."""
    beside = str(tmp_path.parent / tmp_path.name)
    squeue = f"if [ -e {beside}-asked ]; then echo 7 PENDING {reason}; else touch {beside}-asked; echo 7 PENDING None; fi"
    fake(tmp_path, monkeypatch, sbatch="echo 7", squeue=squeue, scancel=f"echo $* > {beside}-taken", sinfo="echo gpu")
    output = refused(tmp_path, capsys)
    assert f"the job run could never start: {reason}" in output and remedy in output
    assert Path(f"{beside}-taken").read_text() == "7\n"


def test_nodes_that_failed_their_check_are_excluded_and_named(slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes are all there are: without both, there is none."""
    run = tmp_path / "runs" / "new"
    (run / "jobs").mkdir(parents=True)
    (run / "jobs" / ".lock").touch()
    (run / "jobs" / "excluded").write_text("n2\nn2\n")
    output = refused(tmp_path, capsys, sbatch=["--exclude=n1"])
    assert "node configuration is not available" in output and f"{run}/jobs/excluded excludes n2: delete" in output
    submit_held(tmp_path, run)
    (job,) = find_jobs(str(run))
    assert "ExcNodeList=n2" in slurm.command("scontrol", "show", "job", job.job.id)
    cancel(str(run))


def submit_held(folder: Path, run: Path, *arguments: str) -> None:
    (folder / "profile.yaml").write_text(
        json.dumps({"type": "slurm", "partition": "main", "cpus_per_node": 1, "time": "00:05:00", "warn_s": 30, "sbatch": ["--hold"]})
    )
    assert main(["submit", SMOKE, "--cluster", str(folder / "profile.yaml"), "-o", f"run_dir={run}", *arguments]) == 0


OTHER = """
if [ ! -e {flag} ]; then
    touch {flag}
    {python} -m oar_scale.cli submit {recipe} --cluster {profile} -o run_dir={other} >{flag} 2>&1
    echo $? >>{flag}
    {ends}
fi
echo 7
"""


def while_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, other: Path, ends: str) -> Path:
    """A sbatch in the middle of whose first call another submission happens, to its end; what that says, and its exit code."""
    flag = folder.parent / f"{folder.name}-flag"
    profile = folder / "profile.yaml"
    fields = {"flag": flag, "python": sys.executable, "recipe": SMOKE, "profile": profile, "other": other, "ends": ends}
    fake(folder, monkeypatch, sbatch=OTHER.format(**fields), squeue="", scancel="", sinfo="")
    profile.write_text('{"type": "slurm", "cpus_per_node": 1, "time": "00:10:00"}')
    return flag


def test_a_refusal_leaves_a_run_submitted_meanwhile_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "runs" / "one", tmp_path / "runs" / "other"
    flag = while_sbatch(tmp_path, monkeypatch, other, "exit 1")
    assert main(["submit", SMOKE, "--cluster", str(tmp_path / "profile.yaml"), "-o", f"run_dir={one}"]) == 2
    assert flag.read_text() == "submitted run as job 7\n0\n"
    assert last_submission(str(other)).jobs[0].id == "7" and (other / "jobs" / "1-run" / "job.sbatch").exists()
    assert not one.exists()


def test_of_two_submissions_at_once_the_second_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "one"
    flag = while_sbatch(tmp_path, monkeypatch, run, ":")
    assert main(["submit", SMOKE, "--cluster", str(tmp_path / "profile.yaml"), "-o", f"run_dir={run}"]) == 0
    assert "another oar submit works on this run" in flag.read_text() and flag.read_text().endswith("\n2\n")
    script = run / "jobs" / "1-run" / "job.sbatch"
    assert last_submission(str(run)).jobs[0].id == "7" and stat.S_IMODE(script.stat().st_mode) == 0o600, "it has the profile's environment"


def test_a_refusal_keeps_files_of_submissions_without_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "runs" / "new" / "jobs" / "1-run"
    old.mkdir(parents=True)
    (old / "5.log").write_text("said\n")
    (old.parent / "recipe-1.yaml").write_text("name: old\n")
    (old.parent / ".lock").touch()
    fake(tmp_path, monkeypatch, sbatch="exit 1", sinfo="")
    refused(tmp_path, capsys)


def test_jobs_that_cannot_be_cancelled_are_named_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller goes in the middle of a chain."""
    gone = "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1"
    here = f"{tmp_path}/bin"
    fake(tmp_path, monkeypatch, sbatch=f"[ -e {here}/first ] && {{ {gone}; }}; touch {here}/first; echo 7", scancel=gone, squeue=gone)
    (tmp_path / "profile.yaml").write_text('{"type": "slurm", "cpus_per_node": 1, "time": "00:10:00"}')
    run = str(tmp_path / "run")
    arguments = ["--cluster", str(tmp_path / "profile.yaml"), "-o", f"run_dir={run}", "--stages", "data,tokens"]
    assert main(["submit", SMOKE, *arguments]) == 2
    output = capsys.readouterr().err
    assert "sbatch refuses the job tokens: Unable to contact" in output and "Not cancelled: data (7)" in output
    assert f"oar cancel {run}" in output
    assert [job.id for job in last_submission(run).jobs] == ["7"] and (tmp_path / "run" / "jobs" / "1-data" / "job.sbatch").exists()


def test_odd_paths_get_their_log_or_are_refused(
    slurm: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stub: Path
) -> None:
    """A space is fine; a backslash is something that Slurm would expand."""
    (tmp_path / "behaviour").write_text("echo at work\n")
    monkeypatch.setenv("BEHAVIOUR", str(tmp_path / "behaviour"))
    monkeypatch.setenv("PATH", f"{stub}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    profile = {
        "type": "slurm",
        "partition": "main",
        "cpus_per_node": 1,
        "time": "00:05:00",
        "warn_s": 30,
        "env": {"PATH": os.environ["PATH"]},
    }
    (tmp_path / "profile.yaml").write_text(json.dumps(profile))
    assert main(["submit", SMOKE, "--cluster", "profile.yaml", "--stages", "data", "-o", "run_dir=my runs/one"]) == 0
    deadline = time.monotonic() + 800
    while not (status := find_jobs("my runs/one")[0]).over and time.monotonic() < deadline:
        time.sleep(0.2)
    assert status.done, status
    text = "".join(logs("my runs/one"))
    assert "at work" in text and f"jobs/1-data/{status.job.id}.log: " in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["behaviour", "my runs", "profile.yaml"]
    assert main(["submit", SMOKE, "--cluster", "profile.yaml", "-o", "run_dir=runs/50\\j"]) == 2
    assert "Slurm writes no log into a folder with a backslash" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> None:
    (folder / "bin").mkdir()
    for name, body in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:/bin:/usr/bin")
