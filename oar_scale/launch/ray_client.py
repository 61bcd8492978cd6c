"""A client of Ray's Jobs API whose errors are for the user: the cluster's message, and the remedy."""

from __future__ import annotations

import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.launch.profile import RayProfile

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ANSWER_S = 10.0
DELETED_AGAIN_S = 2.5
"""How long after a job was deleted Ray's monitor may still record it anew, as failed."""
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Environment variables that would silently override the profile's address."""
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
    """Connect to the cluster at ``address``, the URL of its dashboard.

    Raises:
        UserError: nobody answers within seconds (Ray's own client would wait for minutes), or the token is wrong.
    """
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        pass  # a server is there, and the client below says what is wrong
    except OSError as error:
        raise UserError(
            f"{address}: no Ray answers there ({error}).\n"
            "Is the cluster up, and its dashboard reachable from here (ray dashboard, kubectl port-forward)? Set `address` in the profile."
        ) from error
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.job.sdk"):  # it logs what it is doing
        logging.getLogger(name).setLevel(logging.ERROR)
    hidden = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        with user_errors(f"Ray at {address} does not let us in"):
            return JobSubmissionClient(address)
    finally:
        os.environ.update(hidden)


def job_request(profile: RayProfile, command: str, env: Mapping[str, str]) -> JsonObject:
    """The arguments of :meth:`JobSubmissionClient.submit_job`: a command, where it runs, and what is sent along.

    Args:
        profile: the cluster.
        command: the shell command that the job runs.
        env: variables of the job, beside those of the profile.

    Raises:
        UserError: a variable of ``pass_env`` or the ``working_dir`` does not exist here.
    """
    missing = [name for name in profile.pass_env if name not in os.environ]
    if missing:
        raise UserError(f"pass_env: {', '.join(missing)} is not set in this shell. Export it, or leave it out of the profile.")
    runtime_env: JsonObject = {"env_vars": {**profile.env, **{name: os.environ[name] for name in profile.pass_env}, **env}}
    if profile.working_dir is not None and "://" in profile.working_dir:
        runtime_env["working_dir"] = profile.working_dir
    elif profile.working_dir is not None:
        if not os.path.isdir(profile.working_dir):
            raise UserError(f"working_dir {profile.working_dir}: there is no such folder here. Correct it in the profile.")
        runtime_env |= {"working_dir": os.path.abspath(profile.working_dir), "excludes": list(profile.excludes)}
    if profile.pip:
        runtime_env["pip"] = list(profile.pip)
    request: JsonObject = {"entrypoint": command, "runtime_env": runtime_env}
    request |= {"entrypoint_num_cpus": profile.driver_cpus} if profile.driver_cpus else {}
    request |= {"entrypoint_resources": dict(profile.driver_resources)} if profile.driver_resources else {}
    return request


def start_job(client: JobSubmissionClient, request: JsonObject, job_id: str, name: str, start_s: float) -> None:
    """Submit a job and wait until it runs; after ``start_s`` seconds return although it is still pending.

    Raises:
        UserError: the cluster refuses it, cannot prepare its environment, or does not answer any more. Whatever is raised, the cluster may
            know the job: :func:`remove_job` it.
    """
    deadline = time.monotonic() + start_s
    while True:
        try:
            with user_errors(f"Ray refuses the job {name}"):
                client.submit_job(submission_id=job_id, metadata={"name": name}, **request)
            break
        except UserError as error:  # a head that has just started
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)
    while (now := job_info(client, job_id)) is not None and now.status == "PENDING":
        if time.monotonic() > deadline:
            return
        time.sleep(0.5)
    if now is not None and now.status == "FAILED" and now.driver_exit_code is None:
        raise UserError(explain_refusal(f"the job {name} could not start", f"{now.message}"))


def remove_job(client: JobSubmissionClient, job_id: str) -> None:
    """Stop a job and delete it from the cluster; does nothing if the cluster does not know the job.

    Raises:
        UserError: nobody answers, or the job does not end.
    """
    deadline, check_until = time.monotonic() + ANSWER_S, 0.0
    with user_errors(f"removing {job_id}"):
        while (now := job_info(client, job_id)) is not None or time.monotonic() < check_until:
            if now is not None and now.status.is_terminal():
                client.delete_job(job_id)
                check_until = time.monotonic() + DELETED_AGAIN_S
            elif now is not None and time.monotonic() > deadline:
                raise UserError(f"{job_id} was requested to stop and is still {now.status.value}; it ends when its environment is ready.")
            elif now is not None:
                client.stop_job(job_id)
            time.sleep(0.5)


def job_info(client: JobSubmissionClient, job_id: str) -> JobDetails | None:
    """The cluster's information about a job; None: it does not know the job. Raises UserError where nobody answers."""
    with user_errors(f"asking for {job_id}"):
        try:
            return client.get_job_info(job_id)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return None
            raise


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turn the errors of Ray's client into UserErrors, with the cluster's own message."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (AuthenticationError, RuntimeError, ValueError, ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
        raise UserError(explain_refusal(what, str(error))) from error


def explain_refusal(what: str, text: str) -> str:
    """An error message: what failed, Ray's message (shortened), and the remedy where one is known."""
    text = re.sub(r"\.+ Ensure that the token.*", ".", text, flags=re.DOTALL)  # a page of advice, which the remedy sums up
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if len(lines) > 8:
        lines = [*lines[:2], "...", *lines[-5:]]  # the beginning of a trace says where it failed, its end why
    remedy = next((f"\n{remedy}" for pattern, remedy in REMEDIES if re.search(pattern, text, re.IGNORECASE)), "")
    shown = "\n  ".join(lines)
    return f"{what}: {shown}{remedy}"
