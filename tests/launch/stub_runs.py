"""Runs on a real Slurm whose ``oar`` is a shell script."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oar_scale.launch import find_jobs, submit
from oar_scale.launch.jobs import JobStatus

PROFILE = {
    "type": "slurm",
    "partition": "main",
    "cpus_per_node": 1,
    "time": "00:05:00",
    "warn_s": 30,
    "backoff_s": 1,
    "max_failures": 1,
}
SMOKE = str(Path(__file__).resolve().parents[2] / "recipes" / "smoke.yaml")


@dataclass
class Submitted:
    """A run of the stub, somewhere on its way."""

    run: Path
    behaviour: Path

    def wait(self, condition: Callable[[JobStatus], bool] = lambda status: status.over, seconds: float = 800) -> list[JobStatus]:
        deadline = time.monotonic() + seconds
        while True:
            jobs = find_jobs(str(self.run))
            if all(condition(status) for status in jobs):
                return jobs
            assert time.monotonic() < deadline, f"{jobs}\n{self.logs()}"
            time.sleep(0.3)

    def wait_for(self, text: str, seconds: float = 800) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.logs():
            assert time.monotonic() < deadline, f"{text!r} does not come:\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """By the shells and the drivers of all attempts."""
        return "".join(path.read_text() for path in sorted(self.run.glob("jobs/*/**/*.log")))

    def noted(self, what: str) -> str:
        """What the script left beside itself."""
        return Path(f"{self.behaviour}.{what}").read_text()

    def attempts(self) -> list[str]:
        return sorted(path.suffix[1:] for path in self.run.glob("jobs/1-*/*.*") if path.is_dir())


class StubRuns:
    """Submits runs of the stub."""

    def __init__(self, folder: Path, stub: Path) -> None:
        self.folder, self._stub = folder, stub

    def submit(self, name: str, behaviour: str, stages: str = "report", **profile: Any) -> Submitted:
        """A run of one profile, which differs from :data:`PROFILE` in the fields that are given."""
        folder = self.prepare(name, behaviour, **profile)
        submit(SMOKE, str(folder / "profile.yaml"), stages=stages, overrides=[f"run_dir={folder}/run", f"name={name}"])
        return Submitted(folder / "run", folder / "behaviour.sh")

    def prepare(self, name: str, behaviour: str, stages_of_profile: dict[str, Any] | None = None, **profile: Any) -> Path:
        """The folder of a run that is still to be submitted, with its profile."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        script = folder / "behaviour.sh"
        script.write_text(behaviour)
        given = {
            **PROFILE,
            "stages": stages_of_profile or {},
            "setup": [f"export PATH={self._stub}:$PATH"],
            "env": {"BEHAVIOUR": str(script)},
            **profile,
        }
        (folder / "profile.yaml").write_text(json.dumps(given))  # which is YAML
        return folder
