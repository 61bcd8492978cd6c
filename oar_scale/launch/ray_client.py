"""Ray's Jobs API, with answers for a person: what the cluster says, and the remedy."""

from __future__ import annotations

import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from oar_scale.errors import UserError
from oar_scale.launch.profile import RayProfile

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ANSWER_S = 10.0
SETTLES_S = 2.5
"""So long after a job was deleted Ray's monitor of it may still write down, anew, that it has failed."""
ELSEWHERE = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that would silently win over the profile's address."""
REMEDIES = (
    (
        r"authenticat|unauthori[sz]ed|forbidden",
        "Export RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) with the cluster's token, and RAY_AUTH_MODE=token, in the shell that submits.",
    ),
    (r"runtime.?env", "Correct `pip`, `working_dir` or `env` in the profile; the nodes must reach the index that has the packages."),
    (
        r"package size|exceeds the maximum size|too large",
        "Name what is large in `excludes` of the profile, or choose a smaller `working_dir`.",
    ),
    (r"resources|schedul", "No node has what `driver_cpus` and `driver_resources` of the profile ask for: `ray status` on the cluster."),
)


def connect(address: str) -> JobSubmissionClient:
    """Connected, or a ``UserError`` in seconds: Ray's client itself would wait for minutes."""
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        pass  # somebody is there, and the client says what is wrong
    except OSError as error:
        raise UserError(
            f"{address}: no Ray answers there ({error}).\n"
            "Is the cluster up, and its dashboard reachable from here (ray dashboard, kubectl port-forward)? Set `address` in the profile."
        ) from error
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.job.sdk"):  # on its way it tells what it is doing
        logging.getLogger(name).setLevel(logging.ERROR)
    hidden = {name: os.environ.pop(name) for name in ELSEWHERE if name in os.environ}
    try:
        with told(f"Ray at {address} does not let us in"):
            return JobSubmissionClient(address)
    finally:
        os.environ.update(hidden)


def request(profile: RayProfile, command: str, env: Mapping[str, str]) -> dict[str, Any]:
    """Of :meth:`JobSubmissionClient.submit_job`: a command, where it runs, and all that is sent along.

    Raises:
        UserError: something of it is not here.
    """
    missing = [name for name in profile.pass_env if name not in os.environ]
    if missing:
        raise UserError(f"pass_env: {', '.join(missing)} is not set in this shell. Export it, or leave it out of the profile.")
    runtime_env: dict[str, Any] = {"env_vars": {**profile.env, **{name: os.environ[name] for name in profile.pass_env}, **env}}
    if profile.working_dir is not None and "://" in profile.working_dir:
        runtime_env["working_dir"] = profile.working_dir
    elif profile.working_dir is not None:
        if not os.path.isdir(profile.working_dir):
            raise UserError(f"working_dir {profile.working_dir}: there is no such folder here. Correct it in the profile.")
        runtime_env |= {"working_dir": os.path.abspath(profile.working_dir), "excludes": list(profile.excludes)}
    if profile.pip:
        runtime_env["pip"] = list(profile.pip)
    asked: dict[str, Any] = {"entrypoint": command, "runtime_env": runtime_env}
    asked |= {"entrypoint_num_cpus": profile.driver_cpus} if profile.driver_cpus else {}
    asked |= {"entrypoint_resources": dict(profile.driver_resources)} if profile.driver_resources else {}
    return asked


def begin(client: JobSubmissionClient, asked: dict[str, Any], job_id: str, name: str, start_s: float) -> None:
    """Submit a job, and look until it runs, or waits for longer than one wants to look.

    Raises:
        UserError: the cluster refuses it, cannot prepare its environment, or does not answer any more. Whatever is raised, the cluster may
            know the job: :func:`remove` it.
    """
    deadline = time.monotonic() + start_s
    while True:
        try:
            with told(f"Ray refuses the job {name}"):
                client.submit_job(submission_id=job_id, metadata={"name": name}, **asked)
            break
        except UserError as error:  # a head that has just come up
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)
    while (now := info(client, job_id)) is not None and now.status == "PENDING":
        if time.monotonic() > deadline:
            return
        time.sleep(0.5)
    if now is not None and now.status == "FAILED" and now.driver_exit_code is None:
        raise UserError(refusal(f"the job {name} could not begin", f"{now.message}"))


def remove(client: JobSubmissionClient, job_id: str) -> None:
    """End a job that has hardly begun, and have the cluster forget it; nothing to do where it does not know the job.

    Raises:
        UserError: nobody answers, or the job does not end.
    """
    deadline, settles = time.monotonic() + ANSWER_S, 0.0
    with told(f"removing {job_id}"):
        while (now := info(client, job_id)) is not None or time.monotonic() < settles:
            if now is not None and now.status.is_terminal():
                client.delete_job(job_id)
                settles = time.monotonic() + SETTLES_S
            elif now is not None and time.monotonic() > deadline:
                raise UserError(f"{job_id} was told to stop, and is {now.status.value} still; it goes when its environment is ready.")
            elif now is not None:
                client.stop_job(job_id)
            time.sleep(0.5)


def info(client: JobSubmissionClient, job_id: str) -> JobDetails | None:
    """None: the cluster does not know the job."""
    with told(f"asking for {job_id}"):
        try:
            return client.get_job_info(job_id)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return None
            raise


@contextmanager
def told(what: str) -> Iterator[None]:
    """The cluster's own words about what went wrong, as an error for a person."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (AuthenticationError, RuntimeError, ValueError, ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
        raise UserError(refusal(what, str(error))) from error


def refusal(what: str, words: str) -> str:
    words = re.sub(r"\.+ Ensure that the token.*", ".", words, flags=re.DOTALL)  # a page of advice, of which the remedy is the gist
    lines = [line.strip() for line in words.strip().splitlines() if line.strip()]
    if len(lines) > 8:
        lines = [*lines[:2], "...", *lines[-5:]]  # the beginning of a trace says where, its end says what
    text = "\n  ".join(lines)
    remedy = next((f"\n{remedy}" for pattern, remedy in REMEDIES if re.search(pattern, words, re.IGNORECASE)), "")
    return f"{what}: {text}{remedy}"
