"""Ray: a submission is one job of the Jobs API, sent with the recipe, the code and the variables that it needs.

Ray's jobs cannot wait for one another, so all job specs of a submission become one job, which runs their stages in order
(:mod:`oar_scale.launch.ray_entry`). Where the cluster refuses something, its message is passed on, with a remedy.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shlex
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from ruamel.yaml import YAML

from oar_scale.config.loading import dump_recipe
from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.launch import ray_client
from oar_scale.launch.job_specs import JobSpec
from oar_scale.launch.job_state import JobState
from oar_scale.launch.profile import RayProfile
from oar_scale.launch.ray_entry import RECIPE
from oar_scale.launch.submissions import Job, Submission

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

STOP_S = 30.0
"""Time to stop beyond ``parallel.grace_s``, the recipe's own time to save."""
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Ray's variable for the seconds between SIGTERM and SIGKILL to the processes of a job that is stopped."""
STATES = {"PENDING": "PENDING", "RUNNING": "RUNNING", "STOPPED": "CANCELLED", "SUCCEEDED": "COMPLETED", "FAILED": "FAILED"}
"""Slurm's names of Ray's states."""


def describe(recipe: Recipe, profile: RayProfile, specs: Sequence[JobSpec]) -> str:
    """The jobs that would be submitted, as YAML; nothing is sent, and values that ``pass_env`` takes from this shell are not shown."""
    request = _request(recipe, profile, specs)
    variables = request["runtime_env"]["env_vars"]
    request["runtime_env"]["env_vars"] = variables | dict.fromkeys(profile.pass_env, "(of this shell)") | {RECIPE: "(the recipe, below)"}
    text, yaml = StringIO(), YAML()
    yaml.width = 4096
    yaml.dump({"address": profile.address, **request}, text)
    return f"{text.getvalue()}---\n{dump_recipe(on_cluster(recipe, profile))}"


def submit_job(recipe: Recipe, profile: RayProfile, specs: Sequence[JobSpec], submission: Submission) -> None:
    """Submit the specs as one job and wait until it starts. The job is added to the submission before it is sent, so that
    whatever happens then, it can be withdrawn.

    Raises:
        UserError: the cluster does not answer, refuses the job or cannot prepare its environment; see :func:`withdraw`.
    """
    request = _request(recipe, profile, specs)
    name = "-".join(spec.name for spec in specs)
    job_id = f"{re.sub('[^A-Za-z0-9_-]', '-', recipe.name)}-{submission.number}-{secrets.token_hex(4)}"
    client, stages = ray_client.connect(profile.address), [stage for spec in specs for stage in spec.stages]
    submission.jobs.append(Job(name, stages, job_id, os.path.join("jobs", f"{submission.number}-{name}")))
    ray_client.start_job(client, request, job_id, name, profile.start_s)


def withdraw(submission: Submission) -> None:
    """Remove the jobs of a submission that failed. Raises UserError where nobody answers, or a job does not end."""
    client = ray_client.connect(submission.where)
    for job in submission.jobs:
        ray_client.remove_job(client, job.id)


def states(submission: Submission) -> dict[str, JobState]:
    """The state of each job by its id. Raises UserError where nobody answers."""
    client = ray_client.connect(submission.where)
    infos = {job.id: ray_client.job_info(client, job.id) for job in submission.jobs}
    return {job_id: _state(info) for job_id, info in infos.items()}


def cancel(submission: Submission, jobs: Sequence[Job]) -> None:
    """Stop jobs: their drivers get SIGTERM, save and exit. Raises UserError where nobody answers, or a job does not end."""
    client = ray_client.connect(submission.where)
    grace_s = 0.0
    for job in jobs:
        with ray_client.user_errors(f"stopping {job.name} ({job.id})"):
            info = client.get_job_info(job.id)
            if info.status == "RUNNING":
                grace_s = max(grace_s, float(((info.runtime_env or {}).get("env_vars") or {}).get(STOP_WAIT, 0)))
            client.stop_job(job.id)
    deadline = time.monotonic() + grace_s + STOP_S
    for job in jobs:
        while (now := ray_client.job_info(client, job.id)) is not None and not now.status.is_terminal():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{job.name} ({job.id}) was requested to stop and is still {now.status.value}; one that waits for its environment ends "
                    "when that is ready. Check again: oar jobs RUN"
                )
            time.sleep(0.5)


def logs(submission: Submission, job: str | None, follow: bool) -> Iterator[str]:
    """Yield the lines of a job's log, which the cluster keeps as long as it runs.

    Args:
        submission: of the job.
        job: name or id of the job; None: the first one.
        follow: wait for new lines until the job ends.

    Raises:
        UserError: there is no such job, or nobody answers.
    """
    chosen = next((each for each in submission.jobs if job in (None, each.name, each.id)), None)
    if chosen is None:
        names = ", ".join(f"{each.name} ({each.id})" for each in submission.jobs)
        raise UserError(f"no job {job!r} in the last submission; it has {names}")
    client, what = ray_client.connect(submission.where), f"the log of {chosen.name} ({chosen.id})"
    if not follow:
        with ray_client.user_errors(what):
            text = client.get_job_logs(chosen.id)
        yield from (line.rsplit("\r", 1)[-1] for line in text.splitlines())
        return
    with asyncio.Runner() as runner:
        chunks, rest = client.tail_job_logs(chosen.id), ""
        while True:
            with ray_client.user_errors(what):
                chunk = runner.run(_next(chunks))
            if chunk is None:
                break
            *lines, rest = (rest + chunk).split("\n")
            yield from (line.rsplit("\r", 1)[-1] for line in lines)
        if rest:
            yield rest


async def _next(chunks: AsyncIterator[str]) -> str | None:
    chunk: str | None = await anext(chunks, None)
    return chunk


def _request(recipe: Recipe, profile: RayProfile, specs: Sequence[JobSpec]) -> JsonObject:
    check_root(recipe, profile)
    entry = ["-m", "oar_scale.launch.ray_entry", f"--max-failures={profile.max_failures}", f"--backoff-s={profile.backoff_s}"]
    entry += [f"--folder={profile.folder}"] if profile.folder else []
    stages = [stage for spec in specs for stage in spec.stages]
    env = {RECIPE: dump_recipe(on_cluster(recipe, profile)), STOP_WAIT: str(int(recipe.parallel.grace_s + STOP_S / 2))}
    return ray_client.job_request(profile, f"exec {profile.python} {shlex.join([*entry, *stages])}", env)


def check_root(recipe: Recipe, profile: RayProfile) -> None:
    """Raise UserError where the run's results would lie in a folder that is deleted with the job."""
    if not recipe.root.startswith(("s3://", "/")) and profile.folder is None:
        raise UserError(
            f"the run's results would lie in {recipe.root!r} of a copy that goes with the job.\n"
            "Set storage.root to s3://BUCKET/PREFIX in the recipe, or `folder` in the profile to a file system that all nodes share."
        )


def on_cluster(recipe: Recipe, profile: RayProfile) -> Recipe:
    """The recipe with the profile's ``placement`` and ``gpu_type`` of the workers."""
    overrides = {name: value for name in ("placement", "gpu_type") if (value := getattr(profile, name)) is not None}
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=overrides)})


def _state(info: JobDetails | None) -> JobState:
    if info is None:
        return JobState("UNKNOWN", "the cluster does not know it (any more)")
    name = STATES[info.status.value]
    details = []
    if name == "PENDING":
        details.append(info.message or "")
    if name == "RUNNING" and info.start_time:
        details.append(f"since {time.strftime('%Y-%m-%d %H:%M', time.localtime(info.start_time / 1000))}")
    if name == "FAILED":
        code = info.driver_exit_code
        details.append((info.message or "").partition("\n")[0] if code is None else f"exit code {code}, see oar logs")
    return JobState(name, "; ".join(detail for detail in details if detail))
