"""The processes of an evaluation end with the one that asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_until

SCRIPT = """
import os, sys, time
from dataclasses import dataclass
from oar_scale.evaluation.eval_tasks import run_eval_tasks

@dataclass(frozen=True)
class Slow:
    folder: str

    def run(self):
        open(f"{self.folder}/{os.getpid()}", "w").close()
        time.sleep(600)

if __name__ == "__main__":
    run_eval_tasks([Slow(sys.argv[1])] * 4, ["cpu", "cpu"], 1, lambda: None)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_they_do_not_outlive_a_killed_evaluation(number: signal.Signals, tmp_path: Path) -> None:
    """They would finish what they do beside the next attempt, and keep their memory for ever."""
    script, seen = tmp_path / "evaluation.py", tmp_path / "seen"
    script.write_text(SCRIPT)
    seen.mkdir()
    evaluation = subprocess.Popen([sys.executable, str(script), str(seen)])
    try:
        wait_until(lambda: len(os.listdir(seen)) == 2)
    finally:
        evaluation.send_signal(number)
        evaluation.wait()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in os.listdir(seen)))
