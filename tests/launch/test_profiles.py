"""A profile is checked before anything is submitted: each mistake is named with its location and the remedy."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from oar_scale.config.loading import load_recipe
from oar_scale.errors import UserError
from oar_scale.launch import cluster_doctor
from oar_scale.launch.job_specs import JobSpec, plan_jobs
from oar_scale.launch.profile import Container, Resources, SlurmProfile, load_profile, seconds
from oar_scale.launch.slurm import container, render

SMOKE = str(Path(__file__).resolve().parents[2] / "recipes" / "smoke.yaml")
GOOD = 'type: slurm\ncpus_per_node: 8\ntime: "01:00:00"\n'


def load(folder: Path, text: str, *overrides: str) -> SlurmProfile:
    (folder / "mine.yaml").write_text(text)
    profile = load_profile(str(folder / "mine.yaml"), overrides)
    assert isinstance(profile, SlurmProfile)
    return profile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "partitoin: gpu\n", r"mine.yaml:4  partitoin = \"gpu\"\n  unknown key. Did you mean partition\?"),
        (GOOD + "stages: {extract: {partitoin: gpu}}\n", r"stages.extract.partitoin.*\n.*Did you mean partition\?"),
        (
            GOOD + "container: {engine: docker, image: x}\n",
            r"mine.yaml:4  container.engine = \"docker\"\n  must be 'apptainer' or 'enroot'",
        ),
        (GOOD + "nodes: two\n", r"mine.yaml:4  nodes = \"two\"\n  must be a valid integer"),
        (GOOD + "nodes: 0\n", "greater than or equal to 1"),
        (GOOD + "warn_s: 3600\n", "warn_s 3600 leaves less than half of time 01:00:00 to work in"),
        (GOOD + 'stages: {evaluate: {time: "00:05:00"}}\n', "less than half of stages.evaluate.time 00:05:00"),
        (GOOD + "nodes: 2\nmin_nodes: 3\n", "min_nodes 3 is above nodes 2"),
        (GOOD + "stages: {evaluate: {array: 4}}\n", "stages.evaluate.array: only extract can be a job array"),
        (GOOD + 'partition: "gpu; rm -rf /"\n', r"mine.yaml:4  partition"),
        (GOOD + "sbatch: [constraint=ib]\n", r"mine.yaml:4  sbatch.0.*\n  must match pattern"),
        (GOOD + "env: {WANDB_API_KEY: abc}\n", "WANDB_API_KEY: keys and passwords do not belong in a profile; export it"),
        (GOOD + "env: {HF_TOKEN: abc}\n", "keys and passwords"),
        (GOOD + "env: {MY-NAME: abc}\n", "'MY-NAME' is no name of a variable"),
        (GOOD + "env: {A: '$$x/${X:-/tmp}/${Y}'}\n", r"A: \$\{X:-/tmp\} would be taken as it stands"),
        (GOOD + "env: {A: '${X'}\n", r"A: \$\{X would be taken as it stands"),
        (GOOD + "stages: {pretrian: {nodes: 8}}\n", "'pretrian' is no stage. Did you mean pretrain"),
        (GOOD + "nodes: 0x" + "f" * 5000 + "\n", r"mine.yaml:4  .0xf+\.\.\.. is not a valid int: it is larger than any number here"),
        ("type: slurm\ncpus_per_node: 8\n", "time\n  is required and not set"),
        ("type: slurm\ncpus_per_node: 8\ntime: 90\n", r"mine.yaml:3  time = 90\n  must be a valid string"),
        ('type: slurm\ncpus_per_node: 8\ntime: "90"\n', "'90' is no HH:MM:SS or D-HH:MM:SS; in YAML, put it in quotes"),
        ('type: slurm\ncpus_per_node: 8\ntime: "00:00:30"\n', "below a minute"),
        ("type: pbs\n", r"mine.yaml:1  type\n  must be one of slurm, ray"),
        ("type: [slurm]\n", r"mine.yaml:1  type\n  must be one of slurm, ray"),
        ("type: {name: slurm}\n", r"type\n  must be one of slurm, ray"),
        ("cpus_per_node: 8\n", "type\n  must be one of slurm, ray"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)


def test_a_profile_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="there is no such cluster profile"):
        load_profile("cluster/slurm/mine.yaml")


def test_variables_that_only_sound_secret_are_allowed(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD + 'env: {TOKENIZERS_PARALLELISM: "false", NCCL_NET: Socket}\n').env["NCCL_NET"] == "Socket"


def test_the_guide_has_every_field() -> None:
    slurm_part = (Path(SMOKE).parents[1] / "docs" / "launching.md").read_text().partition("## Ray clusters")[0]
    fields = {*SlurmProfile.model_fields, *Resources.model_fields, *Container.model_fields}
    assert not {name for name in fields if f"`{name}`" not in slurm_part and f"`{name}: N`" not in slurm_part}


def test_times_are_read_as_slurm_writes_them() -> None:
    assert seconds("1-02:03:04") == 93784 and seconds("00:10:00") == 600


def test_a_profile_extends_another_and_is_overridden(tmp_path: Path) -> None:
    """Fields of the command line win over those of the profile, which win over those that it extends."""
    (tmp_path / "site.yaml").write_text(GOOD + "partition: gpu\nstages: {evaluate: {nodes: 1}}\n")
    profile = load(tmp_path, "extends: site.yaml\nnodes: 4\nmin_nodes: 3\n", "partition=debug")
    assert (profile.partition, profile.nodes, profile.cpus_per_node) == ("debug", 4, 8)
    assert profile.resources("pretrain").min_nodes == 3
    assert profile.resources("evaluate").nodes == 1 and profile.resources("evaluate").min_nodes is None


def test_a_stage_takes_back_what_does_not_fit_it(tmp_path: Path) -> None:
    site = "node_check: 'false'\nsbatch: [--exclusive]\nnodes: 4\naccount: all\ngpu_type: h100\ngpus_per_node: 8\n"
    profile = load(tmp_path, GOOD + site + "stages: {report: {node_check: null, sbatch: [], account: null, gpu_type: a100, nodes: null}}\n")
    report, training = profile.resources("report"), profile.resources("pretrain")
    assert (report.node_check, report.sbatch, report.account, report.gpu_type, report.nodes) == (None, (), None, "a100", 4)
    assert (training.node_check, training.sbatch, training.account) == ("false", ("--exclusive",), "all")


def test_the_gpu_profiles_check_no_gpus_where_they_ask_for_none() -> None:
    for path in (Path(SMOKE).parents[1] / "cluster" / "slurm").glob("*.yaml"):
        profile = load_profile(str(path))
        assert isinstance(profile, SlurmProfile)
        for stage in ("data", "tokenizer", "tokens", "pretrain", "extract", "finetune", "evaluate", "report"):
            resources = profile.resources(stage)
            assert resources.gpus_per_node or not resources.node_check, f"{path.name}: {stage}"
            assert "--exclusive" not in resources.sbatch or resources.gpus_per_node == profile.gpus_per_node, f"{path.name}: {stage}"


@pytest.mark.parametrize("folder", ["/a\\b", "/a\nb"])
def test_a_folder_that_slurm_cannot_write_into_is_refused(tmp_path: Path, folder: str) -> None:
    with pytest.raises(UserError, match="Slurm writes no log into a folder with a backslash or a line break"):
        render(JobSpec(("report",)), load(tmp_path, GOOD), title="t", job_name="j", folder="/a", jobs=f"{folder}/jobs/1-report", recipe="r")


@pytest.mark.parametrize(
    ("engine", "mount"), [("apptainer", "--bind=/it's mine"), ("enroot", "--container-mounts=/it's mine:/it's mine,/tmp:/tmp")]
)
def test_a_container_mounts_odd_folders_or_says_that_it_cannot(tmp_path: Path, engine: str, mount: str) -> None:
    profile = load(tmp_path, GOOD + f"container: {{engine: {engine}, image: x.sif}}\n")
    assert mount in shlex.split(" ".join(container(profile, ["/it's mine"]).values()))
    with pytest.raises(UserError, match="/a,b: a folder with a comma or a colon in its name cannot be mounted"):
        container(profile, ["/a,b"])


def test_an_enroot_job_starts_in_the_working_folder_with_the_profiles_variables(tmp_path: Path) -> None:
    """And not where the image says, where the run would be written into the container."""
    text = "env: {A: '1', B: '2'}\ntmp_dir: /local/tmp\nsetup: [module load enroot]\n"
    profile = load(tmp_path, GOOD + text + "container: {engine: enroot, image: 'docker://r/o#x'}\n")
    words = shlex.split(container(profile, ["/my work", "/my work/run"])["srun_container"])
    assert words[0] == "--container-image=docker://r/o#x" and words[2:] == ["--container-workdir=/my work", "--container-env=A,B"]
    assert words[1].split(",")[2:] == ["/tmp:/tmp", "/local/tmp:/local/tmp"]
    job = render(JobSpec(()), profile, title="t", job_name="j", folder="/my work", jobs="/my work/run/jobs/1-run", recipe="/r.yaml")
    steps = [line for line in job.splitlines() if "--container-image" in line]
    assert len(steps) == 2 and all("--container-workdir=/my work" in line for line in steps)
    assert "OAR_RAY_FOLDER=/local/tmp/oar-" in job


def test_a_doctor_runs_setup_outside_of_an_enroot_container(tmp_path: Path) -> None:
    for engine, outside in (("enroot", True), ("apptainer", False)):
        given = load(tmp_path, GOOD + f"setup: [module load x]\nenv: {{A: '1'}}\ncontainer: {{engine: {engine}, image: x.sif}}\n")
        first, _, rest = cluster_doctor._script(given).partition("address=$(srun")
        assert ("module load x" in first, "module load x" in rest) == (outside, not outside)
        assert "export A=1" in rest


@pytest.mark.parametrize("folder", ["local", "/a/much/too/long/folder", "/with space", "/$USER"])
def test_a_folder_for_sockets_is_short_and_absolute(tmp_path: Path, folder: str) -> None:
    with pytest.raises(UserError, match="tmp_dir"):
        load(tmp_path, GOOD + f"tmp_dir: '{folder}'\n")


def test_text_of_a_profile_is_quoted_in_the_job_file(tmp_path: Path) -> None:
    profile = load(tmp_path, GOOD + 'env: {NOTE: "it\'s $(here) `now`"}\nnode_check: test "$X" != \'a b\'\n')
    spec, folder = JobSpec(("report",)), "/a b/it's"
    text = render(spec, profile, title="t", job_name="j", folder=folder, jobs="/a b/jobs/1-report", recipe="/a b/r.yaml")
    assert """export NOTE='it'"'"'s $(here) `now`'""" in text
    assert """cd '/a b/it'"'"'s'""" in text and "run oar report '/a b/r.yaml'" in text
    assert """bash -c '(test "$X" != '"'"'a b'"'"'\n)""" in text


def test_stages_become_jobs_with_the_commands_of_a_laptop() -> None:
    recipe = load_recipe(SMOKE)
    assert [spec.commands("r.yaml") for spec in plan_jobs(recipe, None)] == [[["run", "r.yaml"]]]
    data, training, extraction = plan_jobs(recipe, "data+tokenizer+tokens, pretrain,extract")
    assert data.name == "data-tokenizer-tokens" and data.needs_ray and not plan_jobs(recipe, "evaluate")[0].needs_ray
    assert data.commands("r.yaml") == [["prepare", "r.yaml"], ["tokenizer", "r.yaml"], ["tokens", "r.yaml"]]
    assert training.commands("r.yaml") == [["train", "r.yaml", "--stage", "pretrain"]]
    assert extraction.commands("r.yaml", array=True) == [["extract", "r.yaml", "--array"]]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("pretrain,extrakt", "no stage 'extrakt' in this recipe; its stages are: data, tokenizer"),
        ("pretrain,pretrain", "pretrain is named twice"),
        ("extract,pretrain", "extract needs pretrain, which comes after it"),
        ("pretrain,", "no stage ''"),
    ],
)
def test_stages_that_cannot_follow_one_another_are_refused(stages: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_jobs(load_recipe(SMOKE), stages)
