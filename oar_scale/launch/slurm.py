"""Slurm: renders a job file for each job, calls sbatch, and reports the states of the jobs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from oar_scale.errors import UserError
from oar_scale.launch.job_specs import JobSpec
from oar_scale.launch.job_state import ENDED, JobState
from oar_scale.launch.profile import SlurmProfile
from oar_scale.launch.slurm_client import explain_refusal, run_client

FIRST_SCHEDULING_S = 4.0
"""Slurm tries to schedule a new job within 3 s (batch_sched_delay)."""
UNDECIDED = (["None"], ["PartitionConfig"])
"""Reasons for waiting that Slurm gives before it has tried to schedule a job."""
PORT = "24000 + (SLURM_JOB_ID + 997 * attempt) % 1500 * 4"
"""The first of the four ports of an attempt, as a bash expression."""
HOPELESS = re.compile(
    r"PartitionTimeLimit|PartitionNodeLimit|BadConstraints|InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed"
    r"|(Assoc|QOS)\w*(PerJob|PerNode|MinutesPerJob|WallDurationPerJob|TimeLimit)\w*|DependencyNeverSatisfied"
)
"""Reasons for waiting that do not go away: some clusters accept such jobs and leave them in the queue forever."""
GLOO_INTERFACE = """
interface=$(ip -o -4 address show 2>/dev/null | while read -r _ name _ found _; do [ "${found%%/*}" != "$address" ] || echo "$name"; done)
[ -z "$interface" ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-${interface%%[[:space:]]*}}
""".strip()
"""Shell lines for a node whose ``$address`` is known: gloo, which takes no prefix of a name, uses the interface that has it."""
REFERENCE = re.compile(r"\$\{(?P<braced>[A-Za-z_]\w*)(?P<optional>:-)?\}|\$(?P<plain>[A-Za-z_]\w*)|(?P<home>^~(?=/))|(?P<dollar>\$\$)")
"""A variable in a value of ``env``, in the shell's notation."""
PLAIN = re.compile(r"[\w%+=@:./-]*")
"""Text that needs no quotes in a line ``#SBATCH``."""


def render(
    spec: JobSpec,
    profile: SlurmProfile,
    *,
    title: str,
    job_name: str,
    folder: str,
    jobs: str,
    recipe: str,
    check_stages: Sequence[str] = (),
    later: Sequence[str] = (),
) -> str:
    """Render a job file.

    Args:
        spec: the stages of the job.
        profile: the cluster.
        title: first line of the file, for its reader.
        job_name: the name that squeue shows.
        folder: the folder to which relative paths of the recipe refer.
        jobs: the folder of this job's logs.
        recipe: path of the recipe.
        check_stages: the stages whose packages the job looks for before anything else.
        later: stages that later jobs of the submission do.

    Raises:
        UserError: the run's folder has a name that Slurm cannot write logs into.
    """
    array, resources = profile.array(spec.single_stage), profile.resources(spec.single_stage)
    mounts = (folder, os.path.dirname(os.path.dirname(jobs)))
    return (
        _templates()
        .get_template("job.sbatch.j2")
        .render(
            title=title,
            options=_options(resources, job_name, jobs, array),
            folder=folder,
            jobs=jobs,
            setup=setup_script(profile),
            env=profile.env,
            tmp_dir=profile.tmp_dir,
            cpus=resources.cpus_per_node,
            gpus=resources.gpus_per_node,
            min_nodes=1 if array else resources.min_nodes or resources.nodes,
            node_check=resources.node_check,
            node_address=profile.node_address,
            gloo_interface=GLOO_INTERFACE,
            start_s=profile.start_s,
            warn_s=profile.warn_s,
            object_store_bytes=profile.object_store_mb * 2**20,
            max_failures=profile.max_failures,
            backoff_s=profile.backoff_s,
            ray=spec.needs_ray and not array,
            array=array,
            excluded_nodes=excluded_nodes(resources),
            recipe=recipe,
            stages=spec.stages,
            port=PORT,
            commands=[
                *([(["python", "-m", "oar_scale.launch.needed_packages", recipe, *check_stages], check_stages)] if check_stages else []),
                *(
                    (["oar", *command], [*spec.stages[index + 1 :], *later])
                    for index, command in enumerate(spec.commands(recipe, array=bool(array)))
                ),
            ],
            **container(resources, mounts),
        )
    )


def setup_script(profile: SlurmProfile) -> str:
    """The profile's setup and env, as shell lines. One that fails is reported to the shell function ``setup_failed``, which whoever uses
    this defines before, and ends the shell with code 2."""
    exports = [(name, _shell_value(name, value)) for name, value in profile.env.items()]
    return _templates().get_template("job_setup.sh.j2").render(setup=profile.setup, exports=exports)


def _shell_value(name: str, value: str) -> str:
    """A value of ``env`` for the shell of a job: literal but for ``$NAME``, ``${NAME}``, ``${NAME:-}`` (which may be unset or empty),
    ``$$`` (a dollar) and ``~/`` at its start."""
    pieces, end = [], 0
    for match in REFERENCE.finditer(value):
        pieces += [shlex.quote(value[end : match.start()])] if match.start() > end else []
        variable = match["braced"] or match["plain"] or "HOME"
        unset = f"is not set on this node, and env.{name} of the profile refers to it; \\${{{variable}:-\\}} where it may be unset or empty"
        reference = f'"${{{variable}{match["optional"] or f":?{unset}"}}}"'
        pieces.append("'$'" if match["dollar"] else reference)
        end = match.end()
    return "".join([*pieces, *([shlex.quote(value[end:])] if end < len(value) or not pieces else [])])


def _templates() -> Environment:
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
    return environment


def allocation(profile: SlurmProfile, job_name: str, nodes: int) -> list[str]:
    """The resources of a job, as options of sbatch or salloc."""
    gpus = f"{profile.gpu_type}:{profile.gpus_per_node}" if profile.gpu_type else str(profile.gpus_per_node)
    return [
        f"--job-name={job_name}",
        *(f"--{name}={value}" for name in ("partition", "account", "qos") if (value := getattr(profile, name))),
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={profile.cpus_per_node}",
        *([f"{profile.gpu_option}={'gpu:' if profile.gpu_option == '--gres' else ''}{gpus}"] if profile.gpus_per_node else []),
        *([f"--mem={profile.memory_gb}G"] if profile.memory_gb else []),
        f"--time={profile.time}",
    ]


def _options(profile: SlurmProfile, job_name: str, jobs: str, array: int | None) -> list[str]:
    return [
        *allocation(profile, job_name, 1 if array else profile.nodes),
        f"--signal=B:USR1@{profile.warn_s}",
        "--requeue",
        "--propagate=NONE",  # the limits of the nodes, and not those of a shell on a login node
        "--open-mode=append",
        *([f"--array=0-{array - 1}"] if array else []),
        f"--output={_pattern(jobs, '%A_%a.log' if array else '%j.log')}",
        *profile.sbatch,
    ]


def excluded_nodes(profile: SlurmProfile) -> list[str]:
    """Nodes that the profile's ``sbatch`` options exclude; ``--exclude`` on the command line replaces them, so it has to repeat them."""
    matches = [re.fullmatch(r"--exclude[= ]\s*(\S+)", option) for option in profile.sbatch]
    return [match[1] for match in matches if match]


def refuse_clusters(profile: SlurmProfile) -> None:
    """Raise UserError where jobs would go to another cluster of a multi-cluster Slurm: their states are asked of one's own."""
    options = [*profile.sbatch, *(option for stage in profile.stages.values() for option in stage.sbatch or ())]
    found = [option for option in options if re.match(r"--clusters\b", option)]
    found += [f"SLURM_CLUSTERS={os.environ['SLURM_CLUSTERS']} in this shell"] if os.environ.get("SLURM_CLUSTERS") else []
    if found:
        raise UserError(
            f"{found[0]}: jobs for another cluster of a multi-cluster Slurm are not supported. "
            "Leave that out, and submit on a login node of that cluster, or with its SLURM_CONF."
        )


def _pattern(folder: str, name: str) -> str:
    """A log file in a folder as a value for ``#SBATCH``: % has to be doubled, and a backslash cannot be written at all."""
    if "\\" in folder or "\n" in folder:
        raise UserError(f"{folder!r}: Slurm writes no log into a folder with a backslash or a line break in its name. Set `run_dir`.")
    path = f"{folder.replace('%', '%%')}/{name}"
    return path if PLAIN.fullmatch(path) else '"' + path.replace('"', '\\"') + '"'


def container(profile: SlurmProfile, mounts: Sequence[str]) -> dict[str, str]:
    """How commands get into the profile's container; empty where it has none.

    Args:
        mounts: folders that the container must see; commands start in the first one.

    Returns:
        ``exec_container``, a prefix of commands in a batch shell, and ``srun_container``, options of srun.

    Raises:
        UserError: a folder has a name that cannot be mounted.
    """
    if profile.container is None:
        return {"exec_container": "", "srun_container": ""}
    container = profile.container
    binds = [*dict.fromkeys([*mounts, "/tmp", profile.tmp_dir, *container.mounts])]  # tmp_dir: Ray's sockets
    if unmountable := [mount for mount in mounts if set(",:") & set(mount)]:
        raise UserError(
            f"{unmountable[0]}: a folder with a comma or a colon in its name cannot be mounted. Move it, or do without `container`."
        )
    if container.engine == "apptainer":
        command = [
            "apptainer",
            "exec",
            *(["--nv"] if profile.gpus_per_node else []),
            *(f"--bind={bind}" for bind in binds),
            f"--pwd={mounts[0]}",
            container.image,
        ]
        return {"exec_container": shlex.join(command) + " ", "srun_container": ""}
    both = ",".join(bind if ":" in bind else f"{bind}:{bind}" for bind in binds)
    # Pyxis starts commands in the image's own WORKDIR, and lets the image's variables win over those of the job.
    names = [f"--container-env={','.join(profile.env)}"] if profile.env else []
    options = [f"--container-image={container.image}", f"--container-mounts={both}", f"--container-workdir={mounts[0]}", *names]
    quoted = (option.replace("'", "'\"'\"'") for option in options)  # shlex leaves commas bare; shellcheck objects
    return {"exec_container": "", "srun_container": "".join(f" '{option}'" for option in quoted)}


def sbatch(script: str, name: str, *, after: str | None = None, exclude: Sequence[str] = (), hold: bool = False) -> str:
    """Submit a job file and return the id of the job.

    Args:
        script: path of the job file.
        name: name of the job, for the error.
        after: the id of a job that must succeed first.
        exclude: nodes that the job must not get.
        hold: do not start it before :func:`release`.

    Raises:
        UserError: Slurm refuses the job, or prints no number for it.
    """
    options = [*(["--hold"] if hold else []), *([f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else [])]
    options += [f"--exclude={','.join(exclude)}"] if exclude else []
    done = run_client("sbatch", "--parsable", *options, script)
    if done.returncode:
        raise UserError(explain_refusal(f"sbatch refuses the job {name}", done.stderr))
    numbers = re.findall(r"^(\d+)(?:;\S*)?$", done.stdout, re.MULTILINE)  # a site's wrapper of sbatch may print more
    if not numbers:
        raise UserError(
            f"sbatch has printed no number of the job {name}, but: {done.stdout.strip()[:500]!r}\n"
            "Has it been submitted (squeue --me)? Cancel it with scancel, and have sbatch --parsable print its number on a line of its own."
        )
    return str(numbers[-1])


def release(job: str, name: str) -> None:
    """Let a held job start. Raises as :func:`sbatch`."""
    done = run_client("scontrol", "release", job)
    if done.returncode:
        raise UserError(explain_refusal(f"scontrol release {job} ({name})", done.stderr))


def refuse_hopeless(jobs: Mapping[str, str]) -> None:
    """Raise UserError where one of these jobs could never start, e.g. because of the limits of its partition.

    Slurm cannot tell yet for a job that waits for another one.

    Args:
        jobs: the names of the jobs by their ids.
    """
    deadline = time.monotonic() + FIRST_SCHEDULING_S
    while True:
        queue = run_client("squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%F %T %r").stdout
        waits = [line.split() for line in queue.splitlines() if line.split()[1:2] == ["PENDING"]]
        for job, _, *reason in waits:
            if HOPELESS.fullmatch(" ".join(reason)):
                raise UserError(explain_refusal(f"the job {jobs.get(job, job)} could never start", reason[0]))
        if not any(reason in UNDECIDED for _, _, *reason in waits) or time.monotonic() > deadline:
            return
        time.sleep(0.5)


def scancel(jobs: Sequence[str], conf: str = "") -> None:
    """Cancel jobs; those that are over are ignored.

    Args:
        jobs: their ids.
        conf: the SLURM_CONF they were submitted with; empty: Slurm's default.

    Raises:
        UserError: Slurm does not answer.
    """
    done = run_client("scancel", *jobs, conf=conf)
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(explain_refusal(f"scancel {' '.join(jobs)}", done.stderr))


def states(jobs: Sequence[str], conf: str = "") -> dict[str, JobState]:
    """The state of each job by its id; ``UNKNOWN`` where Slurm has forgotten it. Raises as :func:`scancel`."""
    return {job: _state(job, conf) for job in jobs}


def _state(job: str, conf: str) -> JobState:
    done = run_client("scontrol", "show", "job", "--oneliner", job, conf=conf)
    if done.returncode:
        if "Invalid job id" not in done.stderr:
            raise UserError(explain_refusal(f"scontrol show job {job}", done.stderr))
        question = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State")
        answer = run_client(*question, conf=conf) if shutil.which("sacct") else None
        names = [line.split()[0] for line in answer.stdout.splitlines() if line.split()] if answer and not answer.returncode else []
        return JobState(_array_state(names) if names else "UNKNOWN")
    tasks = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in done.stdout.splitlines() if line.strip()]
    name = _array_state([task.get("JobState", "UNKNOWN") for task in tasks])
    shown = next(task for task in tasks if task.get("JobState", "UNKNOWN") == name)
    detail = [f"on {shown['NodeList']}"] if shown.get("NodeList", "(null)") not in ("", "(null)") else []
    detail += [f"waits: {shown['Reason']}"] if name == "PENDING" else []
    detail += [f"came back {shown['Restarts']} times"] if shown.get("Restarts", "0") != "0" else []
    detail += [f"exit code {shown['ExitCode'].split(':')[0]}"] if name == "FAILED" else []
    if len(tasks) > 1:
        completed = sum(task.get("JobState") == "COMPLETED" for task in tasks)
        detail.append(f"{completed} of {len(tasks)} tasks done")
    return JobState(name, ", ".join(detail))


def _array_state(names: Sequence[str]) -> str:
    """The state of an array, given those of its tasks: running if one runs, else pending if one waits, else failed if one failed."""
    for name in ("RUNNING", "COMPLETING", "PENDING"):
        if name in names:
            return name
    active = [name for name in names if name not in ENDED]  # CONFIGURING, SUSPENDED, ...
    return next((name for name in [*active, *names] if name != "COMPLETED"), names[0])
