"""A node whose slurmd is dead while all else on it works on: Slurm begins the job elsewhere, and can end nothing there."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import psutil
import pytest

from cluster.dev import processes
from cluster.dev import slurm as dev_slurm
from oar_scale.launch import find_jobs, submit
from oar_scale.launch.jobs import JobStatus

SMOKE = str(Path(__file__).resolve().parents[2] / "recipes" / "smoke.yaml")
WORKS = """
trap '' TERM USR1
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    while :; do date +'old %s.%N' >>"$BEHAVIOUR.seen"; sleep 0.1; done
fi
date +'new %s.%N' >>"$BEHAVIOUR.seen"
sleep 3
"""


@pytest.mark.slow  # Slurm takes half a minute to miss a node; in `make test-slow`
def test_an_attempt_without_slurmd_ends_before_the_next_works(own_slurm: dev_slurm.Cluster, stub: Path, tmp_path: Path) -> None:
    """Slurm starts the job elsewhere while the old processes still run: the lease keeps two attempts from working at once."""
    runs = [Lost(own_slurm, stub, tmp_path / name) for name in ("awake", "asleep")]
    for run in runs:
        run.until("old", 800)
    assert runs[0].node() == runs[1].node() == "n1"
    shell, *rest = [process for process in runs[1].processes() if process.cmdline()[-1].endswith("/slurm_script")]
    assert not rest
    shell.suspend()  # it cannot end its steps, as where it is on another node than they are
    old = [process for run in runs for process in run.processes()]
    dev_slurm.lose_node(own_slurm, "n1")
    assert all(processes.is_alive(process) for process in old), "the node's processes are to outlive its slurmd"
    for run in runs:
        run.until("new", 800)
        assert run.node() == "n2"
    for run in runs:
        while not (status := run.status()).over:
            time.sleep(0.3)
        assert status.done and "came back 1 times" in status.detail, run.logs()
        assert run.seen()[-1].startswith("new") and sum(line.startswith("new") for line in run.seen()) == 1, "two attempts worked at once"
    # Whichever it sees first.
    assert re.search("taken away by Slurm|another attempt has taken over", runs[0].logs()) and runs[0].logs().count(" done\n") == 1
    shell.resume()
    deadline = time.monotonic() + 60
    while left := [process for process in old if processes.is_alive(process)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    assert "another attempt has taken over" in runs[1].logs() and runs[1].status().done


class Lost:
    """A run of one job, whose first attempt would work for ever."""

    def __init__(self, cluster: dev_slurm.Cluster, stub: Path, folder: Path) -> None:
        folder.mkdir()
        self._cluster, self._run, self._behaviour = cluster, folder / "run", folder / "behaviour.sh"
        self._behaviour.write_text(WORKS)
        given = {"type": "slurm", "cpus_per_node": 1, "time": "00:10:00", "warn_s": 60, "setup": [f"export PATH={stub}:$PATH"]}
        (folder / "profile.yaml").write_text(json.dumps({**given, "env": {"BEHAVIOUR": str(self._behaviour)}}))
        (self.job,) = submit(SMOKE, str(folder / "profile.yaml"), stages="report", overrides=[f"run_dir={self._run}"]).jobs

    def status(self) -> JobStatus:
        return find_jobs(str(self._run))[0]

    def node(self) -> str:
        """The last one that it was on."""
        return self._cluster.command("squeue", "--noheader", "--states=all", "--jobs", self.job.id, "--format=%N").strip()

    def seen(self) -> list[str]:
        path = Path(f"{self._behaviour}.seen")
        return path.read_text().splitlines() if path.exists() else []

    def until(self, word: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not any(line.startswith(word) for line in self.seen()):
            assert time.monotonic() < deadline, f"no {word}: {self.status()}\n{self.logs()}"
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """Of the job, but for those that come and go: a shell's child is called like the shell until it becomes a program, or ends."""
        before = self._processes()
        time.sleep(1)
        return [process for process in self._processes() if process in before]

    def _processes(self) -> list[psutil.Process]:
        entries = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_JOB_ID") == self.job.id and process.name() not in ("sleep", "date", "cat"):
                    entries.append(process)
            except psutil.Error:
                pass
        return entries

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self._run.glob("jobs/*/**/*.log")))
