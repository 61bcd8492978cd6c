"""Slurm: renders a job file for each job, calls sbatch, and reports the states of the jobs.

Slurm's own words are passed on where it refuses something, with a remedy for the refusals that are met most.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from oar_scale.errors import UserError
from oar_scale.launch.job_specs import JobSpec
from oar_scale.launch.profile import SlurmProfile

CLIENT_S = 60
"""Slurm's commands wait minutes for a controller that is gone."""
LOOK_S = 4.0
"""Slurm takes its first look at a new job within 3 s (batch_sched_delay)."""
UNDECIDED = (["None"], ["PartitionConfig"])
"""What it names as the reason to wait before."""
PORT = "24000 + (SLURM_JOB_ID + 997 * attempt) % 1500 * 4"
"""The first of four that are an attempt's own, as bash computes it."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "NODE_FAIL", "PREEMPTED", "REVOKED"}
"""A job that comes back after a lost node or a preemption is COMPLETING, then PENDING."""
HOPELESS = re.compile(
    r"PartitionTimeLimit|PartitionNodeLimit|BadConstraints|InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed"
    r"|(Assoc|QOS)\w*(PerJob|PerNode|MinutesPerJob|WallDurationPerJob|TimeLimit)\w*|DependencyNeverSatisfied"
)
"""Reasons to wait that no time mends: some clusters accept such jobs and leave them in the queue."""
PLAIN = re.compile(r"[\w%+=@:./-]*")
"""What needs no quotes in a line ``#SBATCH``."""
REMEDIES = (
    (r"invalid partition", "Partitions here: {partitions}. Set `partition` in the profile."),
    (
        r"requested time limit|PartitionTimeLimit",
        "Limits here: {limits}. Lower `time` in the profile; a job that needs longer comes back by itself.",
    ),
    (
        r"invalid account|account/partition|InvalidAccount|AccountNotAllowed|QOS specification|InvalidQOS|QOSNotAllowed",
        "Set `account` and `qos` in the profile to what `sacctmgr show assoc user=$USER` lists.",
    ),
    (
        r"permission denied|not permitted",
        "You may not use that partition with this account and QOS: `scontrol show partition` has AllowGroups, AllowAccounts, AllowQos. "
        "Set `partition`, `account` or `qos` in the profile.",
    ),
    (r"feature", "Features of the nodes here: {features}. Correct `--constraint` in `sbatch` of the profile."),
    (r"node name", "Nodes here: {names}. Correct `--exclude` and `--nodelist` in `sbatch` of the profile."),
    (r"DependencyNeverSatisfied", "The job before it has failed or was taken away meanwhile. Submit again; that stage alone shows why."),
    (r"PartitionNodeLimit", "Nodes of a job here: {sizes}. Change `nodes` in the profile."),
    (
        r"node configuration|node count|more processors|memory specification|\bgres\b|generic resource|BadConstraints",
        "No nodes of the partition have that: {nodes}. Change nodes, cpus_per_node, gpus_per_node, gpu_type, memory_gb, or `sbatch`.",
    ),
    (
        r"QOS|Assoc|accounting|limit",
        "That is a quota: ask for less (nodes, gpus_per_node, time), or set another `account` or `qos`: `sacctmgr show assoc user=$USER`.",
    ),
    (
        r"contact slurm controller|connection refused|timed out|resolve|slurm\.conf|configuration source",
        "The head of the cluster does not answer: is SLURM_CONF right, and slurmctld up (scontrol ping)?",
    ),
)


@dataclass(frozen=True)
class State:
    """What Slurm says of a job; of an array, of its tasks together."""

    word: str
    detail: str = ""

    @property
    def over(self) -> bool:
        return self.word in ENDED or self.word == "UNKNOWN"


def render(spec: JobSpec, profile: SlurmProfile, *, title: str, job_name: str, folder: str, jobs: str, recipe: str) -> str:
    """The job file.

    Args:
        title: what it is, for who reads it.
        job_name: what squeue shows.
        folder: where relative paths of the recipe start.
        jobs: the folder of this job's logs.
        recipe: the recipe's file.

    Raises:
        UserError: the run's folder has a name that Slurm would take for something else.
    """
    array, asked = profile.array(spec.single_stage), profile.resources(spec.single_stage)
    mounts = (folder, os.path.dirname(os.path.dirname(jobs)))
    environment = Environment(
        loader=PackageLoader("oar_scale.launch", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="<#",  # Jinja's own, {#, is also bash's for a length
        comment_end_string="#>",
    )
    environment.filters |= {"q": shlex.quote, "in_single_quotes": lambda text: text.replace("'", "'\\''")}
    return environment.get_template("job.sbatch.j2").render(
        title=title,
        options=_options(asked, job_name, jobs, array),
        folder=folder,
        jobs=jobs,
        setup=profile.setup,
        env=profile.env,
        cpus=asked.cpus_per_node,
        gpus=asked.gpus_per_node,
        min_nodes=1 if array else asked.min_nodes or asked.nodes,
        node_check=asked.node_check,
        node_address=profile.node_address,
        start_s=profile.start_s,
        warn_s=profile.warn_s,
        object_store_bytes=profile.object_store_mb * 2**20,
        max_failures=profile.max_failures,
        backoff_s=profile.backoff_s,
        ray=spec.needs_ray and not array,
        array=array,
        left_out=left_out(asked),
        recipe=recipe,
        port=PORT,
        commands=[shlex.join(["oar", *command]) for command in spec.commands(recipe, array=bool(array))],
        **container(asked, mounts),
    )


def allocation(profile: SlurmProfile, job_name: str, nodes: int) -> list[str]:
    """What a job asks for, as options of sbatch or salloc."""
    gpus = f"{profile.gpu_type}:{profile.gpus_per_node}" if profile.gpu_type else str(profile.gpus_per_node)
    return [
        f"--job-name={job_name}",
        *(f"--{name}={value}" for name in ("partition", "account", "qos") if (value := getattr(profile, name))),
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={profile.cpus_per_node}",
        *([f"--gpus-per-node={gpus}"] if profile.gpus_per_node else []),
        *([f"--mem={profile.memory_gb}G"] if profile.memory_gb else []),
        f"--time={profile.time}",
    ]


def _options(profile: SlurmProfile, job_name: str, jobs: str, array: int | None) -> list[str]:
    return [
        *allocation(profile, job_name, 1 if array else profile.nodes),
        f"--signal=B:USR1@{profile.warn_s}",
        "--requeue",
        "--open-mode=append",
        *([f"--array=0-{array - 1}"] if array else []),
        f"--output={_pattern(jobs, '%A_%a.log' if array else '%j.log')}",
        *profile.sbatch,
    ]


def left_out(profile: SlurmProfile) -> list[str]:
    """The nodes that a profile excludes by itself; ``--exclude`` on the command line would replace, not add."""
    found = [re.fullmatch(r"--exclude[= ]\s*(\S+)", option) for option in profile.sbatch]
    return [match[1] for match in found if match]


def _pattern(folder: str, name: str) -> str:
    """A file in a folder as ``#SBATCH`` has it: % stands for itself only when it is doubled, and a backslash for nothing at all."""
    if "\\" in folder or "\n" in folder:
        raise UserError(f"{folder!r}: Slurm writes no log into a folder with a backslash or a line break in its name. Set `run_dir`.")
    path = f"{folder.replace('%', '%%')}/{name}"
    return path if PLAIN.fullmatch(path) else '"' + path.replace('"', '\\"') + '"'


def container(profile: SlurmProfile, mounts: Sequence[str]) -> dict[str, str]:
    """Words before a command in a batch shell, and options of srun."""
    if profile.container is None:
        return {"exec_container": "", "srun_container": ""}
    container = profile.container
    binds = [*dict.fromkeys([*mounts, "/tmp", *container.mounts])]  # /tmp: Ray's sockets, for commands that connect to it
    if spoilt := [mount for mount in mounts if set(",:") & set(mount)]:
        raise UserError(f"{spoilt[0]}: a folder with a comma or a colon in its name cannot be mounted. Move it, or do without `container`.")
    if container.engine == "apptainer":
        words = ["apptainer", "exec", *(["--nv"] if profile.gpus_per_node else []), *(f"--bind={bind}" for bind in binds), container.image]
        return {"exec_container": shlex.join(words) + " ", "srun_container": ""}
    both = ",".join(bind if ":" in bind else f"{bind}:{bind}" for bind in binds)
    mounted = f"--container-mounts={both}".replace("'", "'\"'\"'")
    return {"exec_container": "", "srun_container": f" --container-image={container.image} '{mounted}'"}


def sbatch(script: str, name: str, *, after: str | None = None, exclude: Sequence[str] = (), hold: bool = False) -> str:
    """Hand a job file to Slurm; returns the id.

    Args:
        script: the file.
        name: for the error.
        after: the id of a job that must succeed first.
        exclude: nodes that it shall not get.
        hold: do not start it before :func:`release`.

    Raises:
        UserError: it is refused.
    """
    options = [*(["--hold"] if hold else []), *([f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else [])]
    options += [f"--exclude={','.join(exclude)}"] if exclude else []
    done = client("sbatch", "--parsable", *options, script)
    if done.returncode:
        raise UserError(refusal(f"sbatch refuses the job {name}", done.stderr))
    return done.stdout.strip().split(";")[0]


def release(job: str, name: str) -> None:
    """Let a held job start. Raises as :func:`sbatch`."""
    done = client("scontrol", "release", job)
    if done.returncode:
        raise UserError(refusal(f"scontrol release {job} ({name})", done.stderr))


def refuse_hopeless(jobs: Mapping[str, str]) -> None:
    """Raises ``UserError`` where one of these jobs, names by id, could never start. Of one that waits for another Slurm cannot tell yet."""
    deadline = time.monotonic() + LOOK_S
    while True:
        asked = client("squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%F %T %r").stdout
        waits = [line.split() for line in asked.splitlines() if line.split()[1:2] == ["PENDING"]]
        for job, _, *reason in waits:
            if HOPELESS.fullmatch(" ".join(reason)):
                raise UserError(refusal(f"the job {jobs.get(job, job)} could never start", reason[0]))
        if not any(reason in UNDECIDED for _, _, *reason in waits) or time.monotonic() > deadline:
            return
        time.sleep(0.5)


def scancel(jobs: Sequence[str], conf: str = "") -> None:
    """Take jobs away; one that is over is no mistake.

    Args:
        conf: the SLURM_CONF they were submitted with; empty: Slurm's own.

    Raises:
        UserError: Slurm does not answer.
    """
    done = client("scancel", *jobs, conf=conf)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(refusal(f"scancel {' '.join(jobs)}", done.stderr))


def states(jobs: Sequence[str], conf: str = "") -> dict[str, State]:
    """What Slurm says of each job; ``UNKNOWN`` of one that it has forgotten. Raises as :func:`scancel`."""
    return {job: _state(job, conf) for job in jobs}


def _state(job: str, conf: str) -> State:
    done = client("scontrol", "show", "job", "--oneliner", job, conf=conf)
    if done.returncode:
        if "Invalid job id" not in done.stderr:
            raise UserError(refusal(f"scontrol show job {job}", done.stderr))
        question = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State")
        asked = client(*question, conf=conf) if shutil.which("sacct") else None
        words = [line.split()[0] for line in asked.stdout.splitlines() if line.split()] if asked and not asked.returncode else []
        return State(_together(words) if words else "UNKNOWN")
    tasks = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in done.stdout.splitlines() if line.strip()]
    word = _together([task.get("JobState", "UNKNOWN") for task in tasks])
    shown = next(task for task in tasks if task.get("JobState", "UNKNOWN") == word)
    detail = [f"on {shown['NodeList']}"] if shown.get("NodeList", "(null)") not in ("", "(null)") else []
    detail += [f"waits: {shown['Reason']}"] if word == "PENDING" else []
    detail += [f"came back {shown['Restarts']} times"] if shown.get("Restarts", "0") != "0" else []
    detail += [f"exit code {shown['ExitCode'].split(':')[0]}"] if word == "FAILED" else []
    if len(tasks) > 1:
        over = sum(task.get("JobState") == "COMPLETED" for task in tasks)
        detail.append(f"{over} of {len(tasks)} tasks done")
    return State(word, ", ".join(detail))


def _together(words: Sequence[str]) -> str:
    """Of the tasks of an array: what runs comes first, then what waits, then what went wrong."""
    for word in ("RUNNING", "COMPLETING", "PENDING"):
        if word in words:
            return word
    return next((word for word in words if word != "COMPLETED"), words[0])


def client(*command: str, conf: str = "") -> subprocess.CompletedProcess[str]:
    """What one of Slurm's commands says. Raises ``UserError`` where it is not installed; a timeout reads as a failure."""
    if shutil.which(command[0]) is None:
        raise UserError(
            f"there is no program {command[0]} on this machine: run oar submit on a login node of the cluster, "
            "or look at the job file only, with --dry-run."
        )
    if conf and not os.path.isfile(conf):  # Slurm would look for another one on the network, for minutes
        return subprocess.CompletedProcess(command, 1, "", f"there is no slurm.conf at {conf} (any more)")
    try:
        where = {**os.environ, "SLURM_CONF": conf} if conf else None
        return subprocess.run(command, env=where, capture_output=True, text=True, timeout=CLIENT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"timed out after {CLIENT_S} s: no answer from the Slurm controller")


def refusal(what: str, words: str) -> str:
    """Slurm's words, and the remedy where one is known."""
    text = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in words.strip().splitlines())
    for pattern, remedy in REMEDIES:
        if re.search(pattern, text, re.IGNORECASE):
            return f"{what}: {text}\n{_filled(remedy)}"
    return f"{what}: {text}"


def _filled(remedy: str) -> str:
    """The remedy with what this cluster has, as far as it says so."""
    shapes = {"partitions": "%R", "limits": "%R %l", "sizes": "%R %s", "features": "%f", "names": "%N"}
    for name, shape in {**shapes, "nodes": "%R: %D nodes of %c CPUs, %m MB, %G"}.items():
        if f"{{{name}}}" in remedy:
            lines = dict.fromkeys(client("sinfo", "--noheader", f"--format={shape}").stdout.splitlines())
            remedy = remedy.replace(f"{{{name}}}", "; ".join(lines) or "unknown")
    return remedy
