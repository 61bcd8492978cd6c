"""The profile decides, and not the shell that submits: whatever options of Slurm it has, and whichever allocation it runs in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stub_runs import SMOKE, StubRuns, Submitted

from cluster.dev.slurm import Cluster
from oar_scale.cli import main
from oar_scale.launch import cancel, find_jobs
from oar_scale.launch.slurm_client import client_env

OPTIONS = {
    "SBATCH_PARTITION": "preempt",
    "SBATCH_TIMELIMIT": "2",
    "SBATCH_NO_REQUEUE": "1",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_OUTPUT": "/dev/null",
    "SBATCH_ARRAY_INX": "0-3",
    "SBATCH_GPUS": "3",
    "SLURM_EXPORT_ENV": "NONE",
    "SRUN_CPUS_PER_TASK": "200",
    "SLURM_NTASKS": "7",
}
"""Options that would change or break a job."""
OUTPUT = {
    "SLURM_TIME_FORMAT": "relative",
    "SQUEUE_FORMAT": "%i",
    "SQUEUE_FORMAT2": "JobID",
    "SQUEUE_STATES": "COMPLETED",
    "SQUEUE_USERS": "nobody",
    "SQUEUE_SORT": "i",
    "SACCT_FORMAT": "JobID",
    "SINFO_PARTITION": "high",
    "SCANCEL_STATE": "SUSPENDED",
    "SCANCEL_INTERACTIVE": "1",
    "SCONTROL_FUTURE": "1",
}
"""Options that would change what Slurm's commands print and do."""


@pytest.fixture(scope="module")
def stub_runs(slurm: Cluster, stub: Path, tmp_path_factory: pytest.TempPathFactory) -> StubRuns:
    return StubRuns(tmp_path_factory.mktemp("shells"), stub)


def test_of_slurms_variables_only_those_that_locate_it_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        monkeypatch.delenv(name)
    given = {"SLURM_CONF": "/c", "SLURM_JWT": "t", "HOME": "/me", "SLURMISH": "1"}
    inside = {
        "SLURM_JOB_ID": "1",
        "SLURM_CLUSTERS": "a",
        "SLURMD_NODENAME": "n1",
        "CUDA_VISIBLE_DEVICES": "0",
        "PMIX_RANK": "0",
        "PMI_RANK": "0",
        "TMPDIR": "/job",
    }
    for name, value in {**given, **OPTIONS, **OUTPUT, **inside}.items():
        monkeypatch.setenv(name, value)
    assert client_env() == given
    assert client_env("/other.conf") == {**given, "SLURM_CONF": "/other.conf"}


def test_options_in_the_shell_change_no_job_and_are_named(
    slurm: Cluster, stub_runs: StubRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(
        '{"type": "slurm", "partition": "main", "cpus_per_node": 1, "time": "00:05:00", "warn_s": 30, "sbatch": ["--hold"]}'
    )
    for name, value in {**OPTIONS, **OUTPUT}.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    assert main(["submit", SMOKE, "--cluster", str(tmp_path / "mine.yaml"), "-o", f"run_dir={run}"]) == 0
    assert "SBATCH_ARRAY_INX, SBATCH_EXPORT, SBATCH_GPUS" in capsys.readouterr().err
    (status,) = find_jobs(str(run))
    shown = subprocess.run(["scontrol", "show", "job", status.job.id], env=slurm_only(slurm), capture_output=True, text=True).stdout
    assert all(part in shown for part in ("Partition=main", "TimeLimit=00:05:00", "Requeue=1", f"StdOut={run}/jobs/"))
    assert "gres/gpu" not in shown and "ArrayTaskId" not in shown
    assert status.state == "PENDING" and cancel(str(run))
    assert find_jobs(str(run))[0].state == "CANCELLED"


def test_a_job_submitted_with_such_a_shell_runs(stub_runs: StubRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    """To its end, requeued once, with the variables of the shell that are not Slurm's."""
    for name, value in {**OPTIONS, **OUTPUT, "MINE": "here"}.items():
        monkeypatch.setenv(name, value)
    run = stub_runs.submit("settings", 'echo "got $MINE"; mkdir "$BEHAVIOUR.seen" 2>/dev/null && exit 1; exit 0')
    (status,) = run.wait()
    assert status.done and run.attempts() == ["0", "1"], run.logs()
    assert "got here" in run.logs()


def test_a_job_without_the_shells_variables_runs_its_steps(stub_runs: StubRuns) -> None:
    run = stub_runs.submit("exported", "echo in a step", sbatch=["--export=NONE"])
    (status,) = run.wait()
    assert status.done and "in a step" in run.logs(), run.logs()


def test_a_job_is_submitted_from_inside_an_allocation(slurm: Cluster, stub_runs: StubRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a step on two GPUs of a node, which are not those of the job."""
    folder = stub_runs.prepare("inside", 'echo "sees ${CUDA_VISIBLE_DEVICES-no} GPUs"')
    submit = f"{sys.executable} -m oar_scale.cli submit {SMOKE} --cluster {folder}/profile.yaml --stages report -o run_dir={folder}/run"
    allocate = ["salloc", "--quiet", "--gpus-per-node=2", "--ntasks=1", "--time=5", "srun", "--gpus-per-task=1", "bash", "-c", submit]
    done = subprocess.run(allocate, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    run = Submitted(folder / "run", folder / "behaviour.sh")
    (status,) = run.wait()
    assert status.done and "sees no GPUs" in run.logs(), run.logs()


@pytest.mark.parametrize(
    ("setup", "named"),
    [
        (["true", "module load no-such-module"], "`module load no-such-module` of setup in the profile ended with code 127"),
        (["source /no/such/activate"], "`source /no/such/activate` of setup in the profile ended with code 1"),
        (["exit 3"], "`exit 3` of setup in the profile ended with code 3"),
        (["set -eu", 'echo "$NO_SUCH_VARIABLE"'], '`echo "$NO_SUCH_VARIABLE"` of setup'),
        (["if true; then", "    false", "fi"], "`if true; then\n    false\nfi` of setup in the profile ended with code 1"),
        (["if true; then"], "`if true; then` of setup"),
        (["A=1", "export PATH=$PATH:/$A", "(exit 4) | true; [ $A = 2 ]"], "`(exit 4) | true; [ $A = 2 ]` of setup"),
    ],
    ids=["command", "file", "exit", "unset", "block", "syntax", "status"],
)
def test_a_setup_line_that_fails_is_named(tmp_path: Path, setup: list[str], named: str) -> None:
    code, output = run_setup(setup, {})
    assert code == 2 and named in output and "WENT ON" not in output, output


def test_setup_lines_share_one_shell_and_may_belong_together() -> None:
    lines = ["shopt -s expand_aliases", "alias load=export", "load LOADED=1", "for x in a b; do", "    SEEN+=$x", "done", "set -e", "true"]
    code, output = run_setup(lines, {"GOT": "$LOADED and ${SEEN} in ~/x $(not) '$", "OF": "~/cache/$SEEN", "A": "$$HOME"})
    home = os.environ["HOME"]
    assert code == 0 and output == f"WENT ON: 1 and ab in ~/x $(not) '$ {home}/cache/ab $HOME\n", output


@pytest.mark.parametrize(
    ("setup", "got"),
    [
        (["export GOT=a\\", "b \\", "    A=c"], "ab  c"),
        (["read -r GOT <<END", "first", "END"], "first  "),
        (["GOT=$(cat <<A; cat <<'B'", "one", "A", "false $(exit 1)", "B", ")"], "one\nfalse $(exit 1)  "),
        (["shopt -s extglob", "GOT=aab", "A=${GOT/+(a)/x}", "case $A in !(xb)) false ;; esac", "OF=1"], "aab 1 xb"),
        (["if true; then", "    GOT=1", "fi"], "1  "),
        (["if false; then", "    false", "else GOT=2; fi"], "2  "),
        (["load() {", "    GOT=$1", "}", "load 3"], "3  "),
        (["true &&", "GOT='a", "b'"], "a\nb  "),
    ],
    ids=["backslash", "heredoc", "heredocs", "extglob", "if", "else", "function", "quotes"],
)
def test_setup_lines_that_go_on_in_the_next_one(setup: list[str], got: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever bash itself says of the shell's environment when it starts."""
    monkeypatch.setenv("LC_ALL", "no_such_locale")
    monkeypatch.setenv("BASH_FUNC_broken%%", "no function")
    code, output = run_setup(setup, {})
    assert code == 0 and f"WENT ON: {got}\n" in output, output


@pytest.mark.parametrize("before", [["cat <<END", "text", "END"], ["shopt -s extglob", "true !(a)"]], ids=["heredoc", "extglob"])
def test_a_line_that_fails_after_such_lines_is_named(before: list[str]) -> None:
    code, output = run_setup([*before, "false", "true"], {})
    assert code == 2 and "the line `false` of setup in the profile ended with code 1" in output, output


def test_a_variable_of_env_that_is_not_set_is_named() -> None:
    code, output = run_setup([], {"CACHE": "/tmp/$NOBODY/x"})
    assert code == 2 and "NOBODY: is not set on this node, and env.CACHE of the profile refers to it" in output
    code, output = run_setup([], {"UID": "0"})
    assert code == 2 and "UID: readonly variable" in output and "the variable UID of env in the profile cannot be set" in output


def test_a_variable_of_env_may_be_said_to_be_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual way to put a folder before a list that may be empty; without that, the variable that is set is named, and the way out."""
    for value in (None, ""):
        monkeypatch.setenv("LIST", value) if value is not None else monkeypatch.delenv("LIST", raising=False)
        code, output = run_setup(["true"], {"GOT": "/x:$LIST", "OF": "1"})
        assert code == 2 and "the variable GOT of env in the profile cannot be set" in output and "${LIST:-} where it may be" in output
        assert run_setup(["true"], {"GOT": "/x:${LIST:-}", "OF": "", "A": "${LIST:-}$$"}) == (0, "WENT ON: /x:  $\n")
    monkeypatch.setenv("LIST", "/y z")
    assert run_setup([], {"GOT": "/x:${LIST:-}", "OF": "", "A": ""}) == (0, "WENT ON: /x:/y z  \n")


def test_a_failing_setup_ends_jobs_and_arrays_with_code_2(stub_runs: StubRuns) -> None:
    setup = ["module load no-such-module"]
    one = stub_runs.submit("unset", "echo WENT ON", setup=setup)
    many = stub_runs.submit("unset-array", "echo WENT ON", stages="extract", setup=setup, stages_of_profile={"extract": {"array": 2}})
    for run in (one, many):
        (status,) = run.wait()
        assert status.state == "FAILED" and "exit code 2" in status.detail, status
        assert "failed: the line `module load no-such-module` of setup in the profile ended with code 127, see" in status.detail
        assert "WENT ON" not in run.logs() and "module: command not found" in run.logs()


def run_setup(setup: list[str], env: dict[str, str]) -> tuple[int, str]:
    """The setup of a profile in a shell that then prints some variables."""
    from oar_scale.launch.profile import SlurmProfile
    from oar_scale.launch.slurm import setup_script

    profile = SlurmProfile(type="slurm", cpus_per_node=1, time="00:10:00", setup=tuple(setup), env=env)
    before, after = 'setup_failed() { echo "$1"; }\n', '\nset +e; echo "WENT ON: $GOT $OF $A"\n'
    done = subprocess.run(["bash", "-c", before + setup_script(profile) + after], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def slurm_only(slurm: Cluster) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], **slurm.env}
