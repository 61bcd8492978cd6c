"""What a Ray job runs: the stages of a submission one after the other, each of which is retried after failures that may be temporary.

OAR_RECIPE="name: ..." python -m oar_scale.launch.ray_entry --max-failures 3 --backoff-s 30 pretrain extract

    0    done: the next command
    2    an error that the user has to fix: the job ends
    75   stopped with everything saved: started again, unless this job was stopped; within a minute of the start it counts as a failure
    else a lost node, a crash: started again after a pause, at most ``--max-failures`` times in a row
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from oar_scale.config.loading import load_recipe
from oar_scale.errors import UserError, first_line
from oar_scale.launch.job_specs import JobSpec
from oar_scale.launch.needed_packages import check_packages
from oar_scale.observe.failure import LATER, RETRIED
from oar_scale.runtime.retry import Backoff, RetryStopped, retry

RECIPE = "OAR_RECIPE"
"""The environment variable that holds the recipe's text."""
SHORT_S = 60.0
"""A command that is stopped sooner has made no progress: it counts as a failure, or it would be started again for ever."""
REPORT_S = 120.0
REMEDY = "In the recipe: correct it and oar submit it again, finished stages are skipped. In the cluster or the data: oar resubmit."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit code of the first command that fails, else 0."""
    parser = argparse.ArgumentParser(prog="ray_entry", description="The stages of a submission, on the cluster.")
    parser.add_argument("--max-failures", type=int, required=True)
    parser.add_argument("--backoff-s", type=float, required=True)
    parser.add_argument("--recipe", metavar="FILE", help=f"default: the text in {RECIPE}")
    parser.add_argument("--folder", help="where relative paths start")
    parser.add_argument("stages", nargs="*", help="none: all of the recipe's")
    options = parser.parse_args(arguments)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())  # Ray sends it to the command as well, which saves and exits
    if options.folder:
        os.makedirs(options.folder, exist_ok=True)
        os.chdir(options.folder)
    with tempfile.TemporaryDirectory(prefix="oar-job-") as scratch:
        recipe = options.recipe or os.path.join(scratch, "recipe.yaml")
        if not options.recipe:
            with open(recipe, "w", encoding="utf-8") as file:
                file.write(os.environ[RECIPE])
        began = time.time()
        try:
            if options.stages:  # oar run looks by itself
                check_packages(load_recipe(recipe), options.stages)
        except UserError as error:
            _say(f"error: {error}")
            _report(recipe, first_line(str(error)), began, options.stages)
            return 2
        for index, command in enumerate(JobSpec(tuple(options.stages)).commands(recipe)):
            if stopped.is_set():  # the command before got the signal as well, and was done nevertheless: this one would not get it
                return os.EX_TEMPFAIL
            env = {**os.environ, RETRIED: "1", LATER: " ".join(options.stages[index + 1 :])}
            if code := _run(command, env, options.max_failures, options.backoff_s, stopped):
                if not stopped.is_set():
                    _report(recipe, f"the job has given up: oar {command[0]} ended with code {code}", began, options.stages)
                return code
    return 0


class _CommandFailed(Exception):
    """A command ended with a code after which another attempt may succeed."""

    def __init__(self, code: int) -> None:
        super().__init__(f"failed with code {code}")
        self.code = code


def _run(command: Sequence[str], env: Mapping[str, str], max_failures: int, backoff_s: float, stopped: threading.Event) -> int:
    """Run a command until it succeeds or another attempt is pointless; return the last exit code."""
    name, backoff = f"oar {command[0]} {' '.join(command[2:])}".rstrip(), Backoff(backoff_s)

    def announce(error: BaseException, pause_s: float) -> None:
        _say(f"{name}: {error} ({backoff.failures} in a row); retried in {pause_s:g} s")

    try:
        return retry(
            lambda: _attempt(name, command, env, backoff, stopped),
            backoff,
            transient=lambda error: isinstance(error, _CommandFailed),
            give_up=lambda: backoff.failures > max_failures,
            stop=stopped,
            before_pause=announce,
        )
    except RetryStopped:
        return os.EX_TEMPFAIL
    except _CommandFailed as failed:
        _say(f"{name}: {failed}, {backoff.failures} times in a row")
        return failed.code if failed.code > 0 else 128 - failed.code


def _attempt(name: str, command: Sequence[str], env: Mapping[str, str], backoff: Backoff, stopped: threading.Event) -> int:
    """Run a command, and again at once each time it has stopped with everything saved. Raises _CommandFailed."""
    while True:
        _say(name)
        began = time.monotonic()
        code = subprocess.call([sys.executable, "-m", "oar_scale.cli", *command], env=env)
        if code == 0:
            return 0
        if stopped.is_set():
            _say(f"{name}: stopped")
            return os.EX_TEMPFAIL
        if code == 2:
            _say(f"{name}: something to fix, see above. {REMEDY}")
            return 2
        if code != os.EX_TEMPFAIL or time.monotonic() - began < SHORT_S:
            raise _CommandFailed(code)
        backoff.progress()
        _say(f"{name}: stopped with everything saved; again")


def _report(recipe: str, why: str, began: float, stages: Sequence[str]) -> None:
    """Record the end of the job in a process of its own: the recipe may be the very fault."""
    command = [sys.executable, "-m", "oar_scale.launch.report_failure", recipe, why, str(began), *stages]
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(command, timeout=REPORT_S, check=False)


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
