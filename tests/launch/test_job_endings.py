"""Each way in which a job may end, on a real Slurm, and what becomes of it then. The ``oar`` in these jobs is a shell script."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest
from stub_runs import SMOKE, StubRuns, Submitted

from cluster.dev.slurm import Cluster
from oar_scale.errors import UserError
from oar_scale.launch import cancel, find_jobs, resubmit, submit
from oar_scale.launch.jobs import JobStatus
from oar_scale.launch.logs import logs
from oar_scale.observe.events import read_events

UNTIL_SIGNALLED = """
trap 'echo got USR1; exit 75' USR1
trap 'echo got TERM; exit 75' TERM
echo waits for a signal
for _ in $(seq 12000); do sleep 0.1; done
"""
WAITS = "waits for a signal"
"""A signal before it, while the step starts, ends the process without output."""
FIRST_TIME = """
if mkdir "$BEHAVIOUR.seen" 2>/dev/null; then
    {first}
fi
"""
HALTS_ONCE = 'echo "$1" >> "$BEHAVIOUR.order"; [ "$1" != evaluate ] || mkdir "$BEHAVIOUR.seen" || exit 0; [ "$1" != evaluate ] || exit 2'
BUSY_CHECK = "mkdir {path} || exit 0; sleep 60"
"""Long the first time."""
SAVES = """
n=$(ls "$BEHAVIOUR.d" 2>/dev/null | wc -l); mkdir -p "$BEHAVIOUR.d/$n" {root}/checkpoints/pretrain/step-$n
touch {root}/checkpoints/pretrain/step-$n/COMMITTED; [ "$n" = 3 ] || exit 75
"""


@pytest.fixture(scope="module")
def stub_runs(slurm: Cluster, stub: Path, tmp_path_factory: pytest.TempPathFactory) -> StubRuns:
    return StubRuns(tmp_path_factory.mktemp("endings"), stub)


@pytest.fixture(scope="module")
def runs(stub_runs: StubRuns) -> dict[str, Submitted]:
    """All at once, since most of their time is Slurm's waiting. Those that wait for their test have the time for it.

    The tests of those that reach their limit come late: until then the others are done.
    """
    first_time = f"test -e {stub_runs.folder}/checked || {{ touch {stub_runs.folder}/checked; false; }}"
    return {
        "limit": stub_runs.submit("limit", FIRST_TIME.format(first=UNTIL_SIGNALLED), time="00:01:00"),
        "crash": stub_runs.submit("crash", "echo crashing; exit 1"),
        "saved": stub_runs.submit("saved", FIRST_TIME.format(first="exit 75")),
        "broken": stub_runs.submit("broken", "echo fine on $SLURMD_NODENAME", node_check=first_time),
        "misspelt": stub_runs.submit("misspelt", "echo fine", node_check="nvidia-smy -L"),
        "harsh": stub_runs.submit("harsh", "echo fine", node_check="false", nodes=2),
        "idle": stub_runs.submit("idle", "exit 75"),
        "back": stub_runs.submit("back", FIRST_TIME.format(first=UNTIL_SIGNALLED), time="00:20:00"),
        "mistake": stub_runs.submit("mistake", "echo 'error: no such column'; exit 2"),
        "missing": stub_runs.submit("missing", "exec no-such-program"),
        "halted": stub_runs.submit("halted", HALTS_ONCE, "data,evaluate,report"),
        "chain": stub_runs.submit("chain", 'echo "$1" >> "$BEHAVIOUR.order"', "data+tokenizer,evaluate"),
        "gone": stub_runs.submit("gone", UNTIL_SIGNALLED, time="00:20:00"),
        "gets-on": stub_runs.submit("gets-on", SAVES.format(root=stub_runs.folder / "gets-on" / "run")),
        "unsaved": stub_runs.submit("unsaved", "trap '' USR1 TERM; while :; do sleep 1; done", time="00:01:00", max_failures=0),
    }


def test_done_is_done(runs: dict[str, Submitted]) -> None:
    first, second = runs["chain"].wait()
    assert first.done and second.done and second.job.after == first.job.id
    assert runs["chain"].noted("order").split() == ["prepare", "tokenizer", "evaluate"]


def test_a_mistake_is_not_tried_again(runs: dict[str, Submitted]) -> None:
    (status,) = runs["mistake"].wait()
    assert status.state == "FAILED" and not status.done and "something to fix" in status.detail
    assert runs["mistake"].attempts() == ["0"]


def test_a_program_that_is_not_there_is_a_mistake(runs: dict[str, Submitted]) -> None:
    (status,) = runs["missing"].wait()
    assert status.state == "FAILED" and "setup in the profile" in status.detail
    assert runs["missing"].attempts() == ["0"]


def test_a_crash_is_retried_after_a_pause_up_to_max_failures(runs: dict[str, Submitted]) -> None:
    (status,) = runs["crash"].wait()
    assert status.state == "FAILED" and "code 1, 2 times in a row" in status.detail
    assert runs["crash"].attempts() == ["0", "1"]
    assert "(1 in a row); retried in 1 s" in runs["crash"].logs()


def test_a_job_that_gives_up_leaves_an_event_for_on_call(runs: dict[str, Submitted]) -> None:
    """Its driver has said nothing: it was no ``oar`` at all."""
    for name, why in (("crash", "code 1, 2 times in a row"), ("mistake", "something to fix"), ("missing", "a program is missing")):
        runs[name].wait()
        [event] = read_events(str(runs[name].run / "events"), "report")
        assert (event["kind"], event["final"]) == ("failed", True) and why in event["cause"], name
    runs["saved"].wait()
    assert not (runs["saved"].run / "events").exists()


def test_a_job_that_saved_comes_back(runs: dict[str, Submitted]) -> None:
    (status,) = runs["saved"].wait()
    assert status.done and "came back 1 time" in status.detail
    assert not list(runs["saved"].run.glob("jobs/*/*.failures"))


def test_a_node_that_fails_its_check_is_excluded_from_then_on(slurm: Cluster, runs: dict[str, Submitted]) -> None:
    (status,) = runs["broken"].wait()
    assert status.done
    (bad,) = (runs["broken"].run / "jobs" / "excluded").read_text().split()
    good = {"n1": "n2", "n2": "n1"}[bad]
    assert f"node {bad} fails its check" in runs["broken"].logs() and f"fine on {good}" in runs["broken"].logs()
    assert not list(runs["broken"].run.glob("jobs/*/*.failures"))
    again = submit(SMOKE, str(runs["broken"].run.parent / "profile.yaml"), stages="report", overrides=[f"run_dir={runs['broken'].run}"])
    assert f"ExcNodeList={bad}" in slurm.command("scontrol", "show", "job", again.jobs[0].id)


def test_a_job_taken_away_during_the_check_excludes_no_node(slurm: Cluster, stub_runs: StubRuns) -> None:
    checks = {name: stub_runs.folder / f"{name}-check" for name in ("checked-back", "checked-gone")}
    back, gone = (stub_runs.submit(name, "echo fine", node_check=BUSY_CHECK.format(path=path)) for name, path in checks.items())
    deadline = time.monotonic() + 800
    while not all(path.exists() for path in checks.values()):
        assert time.monotonic() < deadline, back.logs() + gone.logs()
        time.sleep(0.1)
    slurm.command("scontrol", "requeue", find_jobs(str(back.run))[0].job.id)
    cancel(str(gone.run))
    (came_back,), (went,) = back.wait(), gone.wait()
    assert came_back.done and went.state == "CANCELLED"
    assert "taken away by Slurm" in back.logs()
    assert not [run for run in (back, gone) if (run.run / "jobs" / "excluded").exists()]


def test_a_check_that_is_no_command_excludes_no_node(runs: dict[str, Submitted]) -> None:
    (status,) = runs["misspelt"].wait()
    assert status.state == "FAILED" and "node_check is no command on the nodes" in status.detail
    assert runs["misspelt"].attempts() == ["0"] and not (runs["misspelt"].run / "jobs" / "excluded").exists()


def test_a_check_that_no_node_passes_condemns_none(runs: dict[str, Submitted]) -> None:
    (status,) = runs["harsh"].wait()
    assert status.state == "FAILED" and "no node has passed node_check" in status.detail
    assert runs["harsh"].attempts() == ["0", "1"] and not (runs["harsh"].run / "jobs" / "excluded").exists()


def test_a_job_that_stops_repeatedly_without_progress_fails(runs: dict[str, Submitted]) -> None:
    (status,) = runs["idle"].wait()
    assert status.state == "FAILED" and "without progress" in status.detail and "2 times in a row" in status.detail
    assert runs["idle"].attempts() == ["0", "1", "2"]


def test_a_job_that_gets_on_may_stop_as_often_as_it_likes(runs: dict[str, Submitted]) -> None:
    (status,) = runs["gets-on"].wait()
    assert status.done and runs["gets-on"].attempts() == ["0", "1", "2", "3"], runs["gets-on"].logs()


def test_no_process_of_a_signalled_job_is_left(slurm: Cluster, stub_runs: StubRuns) -> None:
    run = stub_runs.submit("tidy", UNTIL_SIGNALLED.replace("exit 75", "exit 0"), warn_s=119)
    run.wait_for(WAITS)
    (status,) = find_jobs(str(run.run))
    slurm.command("scancel", "--signal=USR1", "--batch", status.job.id)
    (status,) = run.wait()
    assert status.done and "got USR1" in run.logs()
    deadline = time.monotonic() + 60  # before they end by themselves
    while left := [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", "90"]]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_scontrol_requeue_saves_and_counts_as_no_failure(slurm: Cluster, runs: dict[str, Submitted]) -> None:
    runs["back"].wait_for(WAITS)
    (status,) = find_jobs(str(runs["back"].run))
    slurm.command("scontrol", "requeue", status.job.id)
    (status,) = runs["back"].wait()
    assert status.done and runs["back"].attempts() == ["0", "1"]
    assert "got TERM" in runs["back"].logs() and "taken away by Slurm" in runs["back"].logs()
    assert not list(runs["back"].run.glob("jobs/*/*.failures"))


def test_cancelled_jobs_save_and_stay_away(runs: dict[str, Submitted]) -> None:
    runs["gone"].wait_for(WAITS)
    assert [job.name for job in cancel(str(runs["gone"].run))] == ["report"]
    (status,) = runs["gone"].wait()
    assert status.state == "CANCELLED" and not status.done
    assert cancel(str(runs["gone"].run)) == []


def test_a_failure_cancels_the_chain_and_resubmit_resumes_it(runs: dict[str, Submitted]) -> None:
    halted = runs["halted"]
    data, evaluate, report = halted.wait()
    assert data.done and evaluate.state == "FAILED" and report.state == "CANCELLED"
    again = resubmit(str(halted.run))
    assert [job.name for job in again.jobs] == ["evaluate", "report"]
    assert all(status.done for status in halted.wait())
    assert halted.noted("order").split() == ["prepare", "evaluate", "evaluate", "report"]
    with pytest.raises(UserError, match="all jobs of the last submission are done"):
        resubmit(str(halted.run))


def test_a_run_that_is_submitted_cannot_be_submitted_twice(stub_runs: StubRuns, slurm: Cluster) -> None:
    first = stub_runs.submit("twice", UNTIL_SIGNALLED)
    with pytest.raises(UserError, match=r"(?s)submitted already: report .* oar cancel"):
        stub_runs.submit("twice", UNTIL_SIGNALLED)
    with pytest.raises(UserError, match="oar cancel"):
        resubmit(str(first.run))
    cancel(str(first.run))
    first.wait()


def test_oar_logs_follows_a_run_through_its_attempts_to_the_end(stub_runs: StubRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    silences: list[str] = []

    def with_a_silence(run: str) -> list[JobStatus]:
        if not silences:
            silences.append(run)
            raise UserError("slurm_load_jobs error: Unable to contact slurm controller")
        return find_jobs(run)

    module = import_module("oar_scale.launch.logs")
    monkeypatch.setattr(module, "find_jobs", with_a_silence)
    monkeypatch.setattr(module, "STATE_POLL_S", 1.0)
    run = stub_runs.submit("followed", FIRST_TIME.format(first="echo one; exit 75") + "echo two; sleep 1; echo three")
    lines = list(logs(str(run.run), follow=True))
    output = [line.split(": ", 1)[1] for line in lines if "driver.log" in line and "srun: " not in line]
    assert output == ["one", "two", "three"] and silences
    assert any(line.endswith(" done") for line in lines)
    assert list(logs(str(run.run), job="report"))
    with pytest.raises(UserError, match=r"no job 'train' .* it has report"):
        list(logs(str(run.run), job="train"))


def test_a_job_is_signalled_before_its_limit_and_requeued(runs: dict[str, Submitted]) -> None:
    (status,) = runs["limit"].wait()
    assert status.done
    assert "got USR1" in runs["limit"].logs() and runs["limit"].attempts() == ["0", "1"]


def test_a_job_that_never_saves_in_time_ends(runs: dict[str, Submitted]) -> None:
    (status,) = runs["unsaved"].wait()
    assert not status.done and "out of time before everything was saved, 1 times in a row" in status.detail


def test_a_preempted_job_comes_back_without_counting(stub_runs: StubRuns, slurm: Cluster) -> None:
    run = stub_runs.submit("preempted", FIRST_TIME.format(first=UNTIL_SIGNALLED), partition="preempt", max_failures=0)
    run.wait_for(WAITS)
    slurm.command("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    (status,) = run.wait()
    assert status.done and "got TERM" in run.logs() and run.attempts() == ["0", "1"]
