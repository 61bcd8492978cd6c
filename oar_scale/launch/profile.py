"""Cluster profiles: a file that a team writes once, with what to ask the scheduler for and how a shell there gets a working ``oar``.

    cluster/slurm/mine.yaml:4  partitoin = gpu
      unknown key. Did you mean partition?

Profiles may extend one another as recipes do, and ``-p a.b=c`` changes a field.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from oar_scale.config.layers import Setting, read_layers, refuse_secrets
from oar_scale.config.locations import EXPAND, Location, expand_in_context
from oar_scale.config.schema import Section
from oar_scale.errors import UserError
from oar_scale.registry import STAGES, kind_of

ShellWord = Annotated[str, Field(pattern=r"^[^\s'\"$`\\]+$")]
"""Text that goes into a job file unquoted."""
ShellLocation = Annotated[ShellWord, BeforeValidator(expand_in_context)]
"""A path or URL that goes into a job file unquoted."""
Option = Annotated[str, Field(pattern=r"^--[^\n]+$")]
"""An option of sbatch."""
Line = Annotated[str, Field(pattern=r"^[^\n]+$")]
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d\d):(\d\d)")


_NOT_REPLACED = re.compile(r"\$\$|\$\{[A-Za-z_]\w*(?::-)?\}|(?P<other>\$\{[^}]*\}?)")
"""In a value of ``env``: a variable that the shell would replace, and the job does not."""


class Container(Section):
    """The container in which the commands of a job run."""

    engine: Literal["apptainer", "enroot"]
    """``enroot`` is Slurm's Pyxis: srun --container-image."""
    image: ShellLocation
    mounts: tuple[ShellLocation, ...] = ()
    """Folders with the same path inside, or ``OUTSIDE:INSIDE``; the run's folder and the working folder are always mounted."""


class Resources(Section):
    """Resources of one stage that differ from the profile's; ``null`` removes a value that may be unset there."""

    partition: ShellWord | None = None
    account: ShellWord | None = None
    qos: ShellWord | None = None
    nodes: int | None = Field(None, ge=1)
    min_nodes: int | None = Field(None, ge=1)
    cpus_per_node: int | None = Field(None, ge=1)
    gpus_per_node: int | None = Field(None, ge=0)
    gpu_type: ShellWord | None = None
    memory_gb: int | None = Field(None, ge=1)
    time: str | None = None
    sbatch: tuple[Option, ...] | None = None
    node_check: Line | None = None
    array: int | None = Field(None, ge=2)
    """Only for ``extract``: the number of tasks of a job array, each of which works alone, without Ray."""

    @field_validator("time")
    @classmethod
    def _time(cls, given: str | None) -> str | None:
        if given is not None:
            _check_time(given)
        return given


class SlurmProfile(Section):
    """A Slurm cluster. Unset fields are left to Slurm's own defaults."""

    type: Literal["slurm"]
    partition: ShellWord | None = None
    account: ShellWord | None = None
    qos: ShellWord | None = None
    nodes: int = Field(1, ge=1)
    min_nodes: int | None = Field(None, ge=1)
    """Run with as few nodes when others fail ``node_check``; for recipes whose ``parallel.workers`` is a range. Default: ``nodes``."""
    cpus_per_node: int = Field(ge=1)
    gpus_per_node: int = Field(0, ge=0)
    gpu_type: ShellWord | None = None
    gpu_option: Literal["--gpus-per-node", "--gres"] = "--gpus-per-node"
    """How GPUs are asked for; ``--gres`` where a cluster refuses the other (``--gres=gpu:TYPE:N``)."""
    memory_gb: int | None = Field(None, ge=1)
    """GiB of each node."""
    time: str
    """Time limit of one attempt, ``HH:MM:SS`` or ``D-HH:MM:SS``; a job that needs longer is requeued."""
    warn_s: int = Field(300, ge=10)
    """Seconds before that limit at which the driver is signalled to save and exit; at most half of the limit."""
    sbatch: tuple[Option, ...] = ()
    """More options of sbatch, e.g. ``--constraint=ib``."""
    setup: tuple[Line, ...] = ()
    """Shell lines that run before everything else: modules, a virtual environment."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the job. Export keys and passwords in the shell that submits instead: Slurm passes them on."""
    container: Container | None = None
    node_address: Line = "hostname --ip-address | cut -d ' ' -f 1"
    """A shell command that prints a node's address for the others."""
    node_check: Line | None = None
    """A shell command that fails on a node with broken hardware, e.g. ``nvidia-smi -L``; such nodes are excluded and recorded."""
    tmp_dir: Annotated[str, Field(pattern=r"^/[^\s'\"$`\\]*$", max_length=16)] = "/tmp"
    """A folder that each node has for itself, for Ray's sockets and logs and for TMPDIR. Short, as the paths of sockets must be."""
    start_s: int = Field(180, ge=10)
    """Seconds until Ray must be up on all nodes."""
    object_store_mb: int = Field(200, ge=100)
    """Size of Ray's object store on each node; nothing large goes through it."""
    max_failures: int = Field(3, ge=0)
    """Attempts in a row that may fail; those that end at the time limit or by preemption do not count."""
    backoff_s: int = Field(30, ge=0)
    """Seconds before the attempt after a failure; doubled each time, up to ten minutes."""
    stages: dict[str, Resources] = Field(default_factory=dict)
    """Other resources for a stage, and for its arms and seeds."""

    @field_validator("time")
    @classmethod
    def _time(cls, given: str) -> str:
        _check_time(given)
        return given

    @field_validator("env")
    @classmethod
    def _variables(cls, given: dict[str, str]) -> dict[str, str]:
        for name, value in given.items():
            if found := next((match["other"] for match in _NOT_REPLACED.finditer(value) if match["other"]), None):
                raise ValueError(
                    f"{name}: {found} would be taken as it stands. $NAME, ${{NAME}} and ${{NAME:-}} are replaced; anything else can be "
                    "computed in a line of setup (export NAME=...), and a dollar sign itself is $$"
                )
        return _check_env(given)

    @field_validator("stages")
    @classmethod
    def _stages(cls, given: dict[str, Resources]) -> dict[str, Resources]:
        for name in given:
            if name not in STAGES:
                near = difflib.get_close_matches(name, STAGES, n=1)
                raise ValueError(f"{name!r} is no stage. {f'Did you mean {near[0]}?' if near else 'Stages: ' + ', '.join(STAGES)}")
        return given

    @model_validator(mode="after")
    def _fits(self) -> SlurmProfile:
        for name, stage in {"": Resources(), **self.stages}.items():
            own = self.min_nodes if stage.nodes is None else None  # the profile's belongs to its own number of nodes
            nodes, least = stage.nodes or self.nodes, stage.min_nodes or own or 1
            if least > nodes:
                raise ValueError(f"{f'stages.{name}.' if name else ''}min_nodes {least} is above nodes {nodes}")
            time = stage.time or self.time
            if self.warn_s > seconds(time) / 2:
                raise ValueError(f"warn_s {self.warn_s} leaves less than half of {f'stages.{name}.' if name else ''}time {time} to work in")
            if stage.array and name != "extract":
                raise ValueError(f"stages.{name}.array: only extract can be a job array")
        return self

    def resources(self, stage: str) -> SlurmProfile:
        """The profile with the resources of a stage in place of its own. Arms and seeds have those of the stage that they are of."""
        override = self.stages.get(kind_of(stage), Resources()) if stage else Resources()
        given = {name: getattr(override, name) for name in override.model_fields_set - {"array"}}
        chosen = {name: value for name, value in given.items() if value is not None or type(self).model_fields[name].default is None}
        if "nodes" in chosen:
            chosen.setdefault("min_nodes", None)
        return self.model_copy(update=chosen)

    def array(self, stage: str) -> int | None:
        """The number of tasks where a stage is a job array, else None."""
        return self.stages[kind_of(stage)].array if stage and kind_of(stage) in self.stages else None


class RayProfile(Section):
    """A running Ray cluster, reached through its Jobs API."""

    type: Literal["ray"]
    address: Annotated[str, Field(pattern=r"^https?://[^\s]+$")]
    """URL of the dashboard: ``http://HEAD:8265``."""
    working_dir: Location | None = "."
    """A folder that is sent along: small files that the recipe names, and the code where the cluster has none. Default: the current
    folder. Or the URL of a .zip that the nodes download."""
    excludes: tuple[str, ...] = ("/.git", "/.venv", "/runs", "/data", "/weights", "__pycache__")
    """What of it is not sent, as lines of a .gitignore."""
    pip: tuple[Line, ...] = ()
    """Packages that the nodes install first, pinned; empty where the image has them."""
    env: dict[str, str] = Field(default_factory=dict)
    pass_env: tuple[ShellWord, ...] = ()
    """Variables of this shell that the job gets. Everyone who may see the dashboard can read them: keys are better kept on the cluster."""
    python: Line = "python"
    """The interpreter on the cluster's nodes."""
    folder: ShellWord | None = None
    """A folder on the cluster to which relative paths of the recipe refer, without ``~`` and variables. Default: the copy of
    ``working_dir``, deleted with the job."""
    driver_cpus: float = Field(0, ge=0)
    """CPUs of the driver. 0, and no ``driver_resources``: it runs on the head, the node that must not be lost anyway."""
    driver_resources: dict[str, float] = Field(default_factory=dict)
    """Resources of the nodes on which the driver may run instead, e.g. ``{on_demand: 0.001}``."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = None
    """Replaces ``parallel.placement`` of the recipe on this cluster."""
    gpu_type: ShellWord | None = None
    """Replaces ``parallel.gpu_type`` of the recipe on this cluster."""
    start_s: int = Field(120, ge=1)
    """Seconds for which ``oar submit`` waits for the job to start; installing packages may take longer."""
    max_failures: int = Field(3, ge=0)
    """Attempts in a row that may fail."""
    backoff_s: int = Field(30, ge=0)
    """Seconds before the attempt after a failure; doubled each time."""

    @field_validator("folder")
    @classmethod
    def _as_it_is(cls, given: str | None) -> str | None:
        if given is not None and given.startswith("~"):
            raise ValueError(f"{given} would be a home folder of this machine, and not of the cluster's: write the whole path")
        return given

    @field_validator("env")
    @classmethod
    def _variables(cls, given: dict[str, str]) -> dict[str, str]:
        if "PYTHONPATH" in given:
            raise ValueError("PYTHONPATH: is the job's own; code lies in working_dir, in the image or among the packages of pip")
        return _check_env(given)

    def in_folder(self, folder: str) -> RayProfile:
        """The profile for a submission from ``folder``, to which a relative ``working_dir`` refers, whatever the current folder is."""
        if self.working_dir is None or "://" in self.working_dir:
            return self
        return self.model_copy(update={"working_dir": os.path.join(folder, self.working_dir)})


Profile = SlurmProfile | RayProfile
KINDS: dict[str, type[SlurmProfile] | type[RayProfile]] = {"slurm": SlurmProfile, "ray": RayProfile}


def load_profile(path: str, overrides: Sequence[str] = ()) -> Profile:
    """Read and check a profile.

    Raises:
        UserError: no such file, no valid YAML, or wrong fields; the text lists each location and remedy.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such cluster profile. Examples lie in cluster/slurm and cluster/ray.")
    layers = read_layers(path, overrides)
    refuse_secrets(layers, "profile", shell=True)
    kind = layers.child("type")
    if kind is None or not isinstance(kind.value, str) or kind.value not in KINDS:
        raise UserError(f"{kind.origin if kind else path}  type\n  must be one of {', '.join(KINDS)}.")
    try:
        profile: Profile = KINDS[kind.value].model_validate_json(json.dumps(layers.plain()), strict=True, context=EXPAND)
    except ValidationError as error:
        raise UserError("\n".join(_explain(detail, layers, KINDS[kind.value], path) for detail in error.errors())) from error
    return profile


def seconds(time: str) -> int:
    """The seconds of a time in Slurm's notation, ``HH:MM:SS`` or ``D-HH:MM:SS``. Raises ValueError."""
    match = TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"{time!r} is no HH:MM:SS or D-HH:MM:SS; in YAML, put it in quotes")
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _check_time(time: str) -> None:
    if seconds(time) < 60:
        raise ValueError(f"{time} is below a minute, Slurm's unit of limits")


def _check_env(given: dict[str, str]) -> dict[str, str]:
    for name in given:
        if not VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a variable")
    return given


def _explain(detail: ErrorDetails, layers: Setting, model: type[BaseModel], path: str) -> str:
    keys = tuple(str(part) for part in detail["loc"])
    setting, origin = layers, path
    for key in keys:
        inner = setting.child(key)
        if inner is None:
            break
        setting, origin = inner, inner.origin
    shown = "" if isinstance(setting.value, dict) else f" = {json.dumps(setting.value)}"
    cause = detail.get("ctx", {}).get("error")
    match detail["type"]:
        case "extra_forbidden":
            fields = _fields(model, keys[:-1])
            near = difflib.get_close_matches(keys[-1], fields, n=1)
            reason = f"unknown key. Did you mean {near[0]}?" if near else f"unknown key. Keys here: {', '.join(fields)}."
        case "missing":
            reason = "is required and not set."
        case "value_error":
            reason = f"{str(cause).rstrip('.')}."
        case _:
            reason = re.sub(r"^(?:Input|String) should", "must", detail["msg"]) + "."
    return f"{origin}  {'.'.join(keys)}{shown}\n  {reason}" if keys else f"{origin}\n  {reason}"


def _fields(model: type[BaseModel], keys: tuple[str, ...]) -> list[str]:
    """The keys that are allowed below ``keys``."""
    if not keys:
        return list(model.model_fields)
    if keys[0] == "stages":
        return list(Resources.model_fields)
    field = model.model_fields.get(keys[0])
    inner = [each for each in get_args(field.annotation) if isinstance(each, type) and issubclass(each, BaseModel)] if field else []
    return list(inner[0].model_fields) if inner else []
