"""Slurm's commands, run with the profile's settings and not with those of the shell that calls ``oar``.

Each of Slurm's commands takes options from the environment, and an option there beats the same line ``#SBATCH`` of a job file
(SBATCH_PARTITION), changes what is printed (SQUEUE_FORMAT, SLURM_TIME_FORMAT), or belongs to the allocation that the shell runs in
(SLURM_JOB_ID, SLURM_GPUS). None of them reaches a command here, nor a job that is submitted from here.

Where Slurm refuses something, its own message is passed on, with a remedy for the most frequent refusals.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from oar_scale.errors import UserError

CLIENT_S = 60
"""Timeout of one of Slurm's commands, which by themselves wait minutes for a controller that is gone."""
LOCATION = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT"}
"""The variables that say which cluster is meant and who asks; they are kept."""
SETTING = re.compile(r"(?:SLURM|SLURMD|SBATCH|SALLOC|SRUN|SQUEUE|SACCT|SCONTROL|SCANCEL|SINFO|PMI\d?|PMIX\w*?)_\w+")
"""Variables that Slurm's commands read, or that Slurm sets in an allocation and its steps."""
OF_A_NODE = {"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "TMPDIR"}
"""Variables that hold for the machine of the shell, and would hold for the job's nodes too where Slurm does not set them there."""
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
    (
        r"job array specification",
        "An array has at most {array} tasks here (MaxArraySize of `scontrol show config`). Lower `stages.extract.array` in the profile.",
    ),
    (r"DependencyNeverSatisfied", "The job before it has failed or was cancelled meanwhile. Submit again; that stage alone shows why."),
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


def client_env(conf: str = "") -> dict[str, str]:
    """The environment of Slurm's commands, and of the jobs that they submit.

    Args:
        conf: the SLURM_CONF of the cluster; empty: the one of this shell, or Slurm's default.
    """
    kept = {name: value for name, value in os.environ.items() if name in LOCATION or not _is_dropped(name)}
    return {**kept, **({"SLURM_CONF": conf} if conf else {})}


def ignored_options(environment: Mapping[str, str]) -> list[str]:
    """The options of sbatch that a shell sets for itself, and that do not count for jobs of a profile."""
    return sorted(name for name in environment if name.startswith("SBATCH_"))


def run_client(*command: str, conf: str = "") -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Args:
        command: the program and its arguments.
        conf: the SLURM_CONF of the cluster; empty: Slurm's default.

    Returns:
        Exit code and output; a timeout counts as a failure.

    Raises:
        UserError: the program is not installed.
    """
    if shutil.which(command[0]) is None:
        raise UserError(
            f"there is no program {command[0]} on this machine: run oar submit on a login node of the cluster, "
            "or look at the job file only, with --dry-run."
        )
    if conf and not os.path.isfile(conf):  # Slurm would look for another one on the network, for minutes
        return subprocess.CompletedProcess(command, 1, "", f"there is no slurm.conf at {conf} (any more)")
    try:
        return subprocess.run(command, env=client_env(conf), capture_output=True, text=True, timeout=CLIENT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"timed out after {CLIENT_S} s: no answer from the Slurm controller")


def explain_refusal(what: str, stderr: str) -> str:
    """An error message: what failed, what Slurm printed, and the remedy where one is known."""
    text = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in stderr.strip().splitlines())
    for pattern, remedy in REMEDIES:
        if re.search(pattern, text, re.IGNORECASE):
            return f"{what}: {text}\n{_filled(remedy)}"
    return f"{what}: {text}"


def _is_dropped(name: str) -> bool:
    return name in OF_A_NODE or SETTING.fullmatch(name) is not None


def _filled(remedy: str) -> str:
    """The remedy, its placeholders replaced by what sinfo lists of this cluster."""
    shapes = {"partitions": "%R", "limits": "%R %l", "sizes": "%R %s", "features": "%f", "names": "%N"}
    for name, shape in {**shapes, "nodes": "%R: %D nodes of %c CPUs, %m MB, %G"}.items():
        if f"{{{name}}}" in remedy:
            lines = dict.fromkeys(run_client("sinfo", "--noheader", f"--format={shape}").stdout.splitlines())
            remedy = remedy.replace(f"{{{name}}}", "; ".join(lines) or "unknown")
    if "{array}" in remedy:
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run_client("scontrol", "show", "config").stdout, re.MULTILINE)
        remedy = remedy.replace("{array}", found[1] if found else "an unknown number of")
    return remedy
