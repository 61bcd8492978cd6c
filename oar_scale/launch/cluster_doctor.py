"""``oar doctor --cluster PROFILE``: checks that the cluster can run a job as the profile asks for it.

First the scheduler: does it answer, and would it accept such a job? Then a short job on the profile's nodes checks each of them and
measures clocks and bandwidth between them (:mod:`oar_scale.doctor.node_checks`). Nothing is left behind.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence

from oar_scale.config.loading import dump_recipe, load_recipe
from oar_scale.config.schema import Recipe
from oar_scale.doctor.finding import Finding
from oar_scale.doctor.node_checks import GROUP_S, merge_node_reports
from oar_scale.errors import UserError
from oar_scale.launch import slurm
from oar_scale.launch.probe import MARK, NODES, PARTING_S, parse_findings
from oar_scale.launch.profile import RayProfile, SlurmProfile, load_profile
from oar_scale.launch.ray_entry import RECIPE
from oar_scale.launch.slurm_client import client_env, explain_refusal, run_client

CHECK_S = 3 * GROUP_S
"""Time limit of the job on the nodes, from its start."""
TIME = "00:10:00"
"""Time limit given to Slurm in place of the profile's: short jobs start sooner."""
SALLOC_EXIT_S = 10.0
"""How long salloc may take to exit after SIGTERM."""
SBATCH_ONLY = re.compile(r"--(?:array|batch|error|export|export-file|input|open-mode|output|propagate|requeue|no-requeue|wait)\b")
"""Options of sbatch that salloc does not have."""
SETUP = "OAR-SETUP "
"""Marks the line of a node whose setup has failed."""
REPORT_SETUP = f"""
setup_failed() {{ echo "{SETUP}$SLURMD_NODENAME: $1"; }}
"""
ON_NODE = """
{setup}
address=$({node_address})
{gloo_interface}
exec {container}python -m oar_scale.launch.probe slurm
"""
ON_HEAD = """
export SLURM_EXPORT_ENV=ALL
{before}
address=$(srun --overlap --nodes=1 --ntasks=1 --mem=0 --nodelist="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)" \\
    bash -c {node_address}) || exit 1
[ -n "$address" ] || {{ echo "node_address of the profile printed no address" >&2; exit 1; }}
attempt=0
export MASTER_ADDR=$address MASTER_PORT=$(({port}))
srun --overlap --ntasks={all} --ntasks-per-node={tasks} --cpus-per-task={cpus} --mem=0 --kill-on-bad-exit=0 --wait={parting} \\
    {srun_container} bash -c {on_node}
"""


def examine_cluster(cluster: str, profile_overrides: Sequence[str], recipe: str | None, overrides: Sequence[str]) -> Iterator[Finding]:
    """Yield the findings of all checks of a cluster.

    Args:
        cluster: path of the cluster profile.
        profile_overrides: ``a.b=c`` each, of the profile.
        recipe: path of the recipe whose storage and devices are checked; None: only the cluster is.
        overrides: ``a.b=c`` each, of the recipe.

    Raises:
        UserError: the profile or the recipe cannot be read, or the scheduler refuses access.
    """
    profile = load_profile(cluster, profile_overrides)
    loaded = load_recipe(recipe, overrides) if recipe is not None else None
    yield from _ray(profile, loaded) if isinstance(profile, RayProfile) else _slurm(profile, loaded)


def _slurm(profile: SlurmProfile, recipe: Recipe | None) -> Iterator[Finding]:
    slurm.refuse_clusters(profile)
    name = f"oar-doctor-{secrets.token_hex(4)}"
    options = [*slurm.allocation(profile, name, profile.nodes), *profile.sbatch]
    tested = run_client("sbatch", "--test-only", "--wrap=true", *options)
    if tested.returncode:
        yield Finding("FAIL", "scheduler", _one_line(explain_refusal("Slurm would refuse the job", tested.stderr)))
        return
    yield Finding("ok", "scheduler", _one_line(tested.stderr.replace("sbatch: ", "")))
    script = _script(profile)
    known = [option for option in options if not SBATCH_ONLY.match(option)]
    command = ["salloc", "--quiet", f"--immediate={profile.start_s}", *known, f"--time={TIME}", "bash", "-c", script]
    env = {**client_env(), **({RECIPE: dump_recipe(recipe)} if recipe else {})}
    try:
        stdout, stderr = _run_allocated(command, env, name, profile.start_s + CHECK_S)
    except subprocess.TimeoutExpired:
        yield Finding(
            "FAIL", "workers", f"the check on the nodes takes longer than {profile.start_s + CHECK_S:.0f} s; check them with: sinfo -N"
        )
        return
    if MARK not in stdout and SETUP not in stdout and re.search("nodes are busy|immediate|timed out", stderr, re.IGNORECASE):
        text = f"no nodes free in {profile.start_s} s ({_one_line(stderr)}); try again later, or ask for fewer: -p nodes=1"
        yield Finding("warn", "workers", text)
        return
    yield from _job_findings(stdout, stderr, profile.nodes)


def _script(profile: SlurmProfile) -> str:
    """What salloc runs. As in a job, setup is outside of a container that srun starts, and inside the shell that starts any other."""
    container, tasks = slurm.container(profile, [os.getcwd()]), max(1, profile.gpus_per_node)
    setup, before = REPORT_SETUP + slurm.setup_script(profile), ""
    if container["srun_container"]:
        before = f"srun --overlap --nodes=1 --ntasks=1 --mem=0 bash -c {shlex.quote(setup)} || exit 2"
        setup = REPORT_SETUP + slurm.setup_script(profile.model_copy(update={"setup": ()}))
    interface = {"node_address": profile.node_address, "gloo_interface": slurm.GLOO_INTERFACE}
    return ON_HEAD.format(
        before=before,
        node_address=shlex.quote(profile.node_address),
        tasks=tasks,
        all=profile.nodes * tasks,
        cpus=max(1, profile.cpus_per_node // tasks),
        parting=PARTING_S,
        port=slurm.PORT,
        srun_container=container["srun_container"],
        on_node=shlex.quote(ON_NODE.format(setup=setup, container=container["exec_container"], **interface)),
    )


def _run_allocated(command: Sequence[str], env: Mapping[str, str], name: str, timeout_s: float) -> tuple[str, str]:
    """Run a command of salloc and return its stdout and stderr. Whatever ends it early also cancels its allocation."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        return process.communicate(timeout=timeout_s)
    finally:
        if process.returncode is None:
            process.terminate()
            run_client("scancel", f"--name={name}")
            try:
                process.communicate(timeout=SALLOC_EXIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ray(profile: RayProfile, recipe: Recipe | None) -> Iterator[Finding]:
    from oar_scale.launch import ray_client, ray_jobs

    client = ray_client.connect(profile.address)
    yield Finding("ok", "scheduler", f"Ray at {profile.address} answers")
    if recipe is not None:
        ray_jobs.check_root(recipe, profile)
        recipe = recipe.in_folder(profile.folder or "")
    env = {RECIPE: dump_recipe(recipe)} if recipe else {}
    request = ray_client.job_request(profile, f"exec {profile.python} -m oar_scale.launch.probe ray", env)
    job_id, log = f"oar-doctor-{secrets.token_hex(4)}", ""
    deadline = time.monotonic() + profile.start_s + CHECK_S
    try:
        ray_client.start_job(client, request, job_id, "oar doctor", profile.start_s)
        while (info := ray_client.job_info(client, job_id)) is not None and not info.status.is_terminal() and time.monotonic() < deadline:
            time.sleep(0.5)
        log = client.get_job_logs(job_id)
    except UserError as error:
        yield Finding("FAIL", "job", _one_line(error))
        return
    finally:
        ray_client.remove_job(client, job_id)
    wanted = [finding for finding in parse_findings(log)[1] if finding.item == NODES]
    yield from _job_findings(log, log, None)
    if profile.gpu_type and wanted and profile.gpu_type not in wanted[0].text:
        text = f"no node has one of type {profile.gpu_type} now; correct gpu_type, or let the autoscaler bring one"
        yield Finding("warn", "GPU type", text)


def _job_findings(log: str, errors: str, nodes: int | None) -> Iterator[Finding]:
    """The findings in the job's log; where there are none, a finding with the last lines that it printed."""
    reports, findings = parse_findings(log)
    if failed := [line.removeprefix(SETUP) for line in log.splitlines() if line.startswith(SETUP)]:
        text = f"{'; '.join(dict.fromkeys(failed))} ({_one_line(errors)[-300:]})"
        yield Finding("FAIL", "setup", text)
    if not reports:
        last = "; ".join(line for line in errors.strip().splitlines()[-3:])
        yield Finding("FAIL", "workers", f"no node answered ({last}); do `setup` and `python` of the profile find oar_scale there?")
    elif nodes is not None and len(reports) < nodes:
        text = f"{len(reports)} of {nodes} nodes answered: {', '.join(each.node for each in reports)}; {errors.strip()[-300:]}"
        yield Finding("FAIL", "workers", _one_line(text))
    yield from merge_node_reports(reports)
    yield from findings


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
