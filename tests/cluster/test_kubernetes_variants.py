"""The variants for Kubernetes: patches of the job, the monitor of its figures, and a run on one node."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cluster_files import CLUSTER, LONGEST_GRACE_S, MANIFESTS, PATCHES, check, manifest, spec_of

from oar_scale.config.loading import load_recipe
from oar_scale.observe.failure import RETRIED

FOLDER = CLUSTER / "kuberay"
EFA, KUEUE = FOLDER / "efa.patch.yaml", FOLDER / "kueue.patch.yaml"


def patched(*patches: Path) -> dict[str, Any]:
    """The job with these patches (JSON Patch, RFC 6902)."""
    document = copy.deepcopy(manifest(FOLDER / "job.yaml"))
    for patch in patches:
        for change in yaml.safe_load(patch.read_text()):
            *way, last = (part.replace("~1", "/").replace("~0", "~") for part in change["path"].split("/")[1:])
            at: Any = document
            for part in way:
                at = at[int(part) if isinstance(at, list) else part]
            assert change["op"] == "add" or last in at, f"{change['path']} is not there to be changed"
            if change["op"] == "remove":
                del at[last]
            else:
                at[last] = change["value"]
    return document


def worker(document: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = document["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return group


@pytest.mark.parametrize("patches", [(EFA,), (KUEUE,), (KUEUE, EFA)], ids=["efa", "kueue", "both"])
def test_a_patched_job_is_what_kuberay_takes(patches: tuple[Path, ...]) -> None:
    check(patched(*patches))


def test_kustomize_takes_what_is_patched() -> None:
    """It refuses a resource without a name of its own."""
    for resource in manifest(FOLDER / "kustomization.yaml")["resources"]:
        assert manifest(FOLDER / resource)["metadata"].get("name"), resource


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which no other test does")
def test_kubectl_kustomize_applies_both_patches() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == patched(KUEUE, EFA)


def test_the_list_of_patches_is_the_one_of_the_folder() -> None:
    listed = manifest(FOLDER / "kustomization.yaml")
    assert listed["resources"] == ["job.yaml"]
    assert {each["path"] for each in listed["patches"]} == {path.name for path in PATCHES} == {EFA.name, KUEUE.name}
    assert all(each["target"] == {"kind": "RayJob"} for each in listed["patches"])


def test_kueue_gets_a_gang_of_one_size() -> None:
    document = patched(KUEUE)
    spec, group = document["spec"], worker(document)
    assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] and spec["suspend"] and spec["shutdownAfterJobFinishes"]
    assert not spec["rayClusterSpec"]["enableInTreeAutoscaling"] and "autoscalerOptions" not in spec["rayClusterSpec"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 1


def test_efa_workers_have_adapters_huge_pages_and_locked_memory() -> None:
    pod = worker(patched(EFA))["template"]["spec"]
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"] and limits["vpc.amazonaws.com/efa"] == "32" and limits["hugepages-2Mi"]
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"] and container["image"].endswith("-efa")
    assert pod["nodeSelector"]["node.kubernetes.io/instance-type"] == "p5.48xlarge"


def test_a_wrong_recipe_builds_no_second_cluster() -> None:
    """KubeRay does not see exit codes; a plain job does."""
    assert manifest(FOLDER / "job.yaml")["spec"]["backoffLimit"] == 0
    spec = manifest(FOLDER / "one-node.yaml")["spec"]
    rules = {rule["action"]: rule for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    (container,) = spec["template"]["spec"]["containers"]
    assert rules["FailJob"]["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert rules["Ignore"]["onExitCodes"]["values"] == [75] and spec["template"]["spec"]["restartPolicy"] == "Never"
    assert {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}], "action": "Ignore"} in spec["podFailurePolicy"]["rules"]


def test_the_pod_of_one_node_is_that_of_a_worker() -> None:
    """With the same image, resources, scratch and shared memory."""
    pod = manifest(FOLDER / "one-node.yaml")["spec"]["template"]["spec"]
    of_worker = spec_of(FOLDER / "job.yaml")["workerGroupSpecs"][0]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > LONGEST_GRACE_S
    for name in ("image", "resources", "envFrom"):
        assert pod["containers"][0][name] == of_worker["containers"][0][name]
    retried = {"name": RETRIED, "value": "1"}  # Kubernetes starts it again; for workers that is the driver's affair
    assert pod["containers"][0]["env"] == [*of_worker["containers"][0]["env"], retried]
    assert pod["securityContext"] == of_worker["securityContext"] and pod["tolerations"] == of_worker["tolerations"]
    assert all(volume in pod["volumes"] for volume in of_worker["volumes"])
    mounted = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == mounted


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_pods_ask_for_the_disk_that_they_may_fill(path: Path) -> None:
    spec = spec_of(path)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        limit = int(pod["containers"][0]["resources"]["limits"]["ephemeral-storage"].removesuffix("Gi"))
        volumes = [volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume and volume["emptyDir"].get("medium") != "Memory"]
        assert limit > sum(int(volume["sizeLimit"].removesuffix("Gi")) for volume in volumes)


def test_the_monitor_finds_the_port_of_every_driver(tmp_path: Path) -> None:
    monitor = manifest(FOLDER / "podmonitor.yaml")
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    one_node = manifest(FOLDER / "one-node.yaml")["spec"]["template"]
    (wanted,) = monitor["spec"]["selector"]["matchExpressions"]
    assert one_node["metadata"]["labels"][wanted["key"]] in wanted["values"]  # KubeRay itself puts the label on its heads
    heads = [spec_of(path)["headGroupSpec"]["template"] for path in MANIFESTS]
    recipe = tmp_path / "recipe.yaml"
    (said,) = [line for line in (FOLDER / "podmonitor.yaml").read_text().splitlines() if "observe: {" in line]
    recipe.write_text(f"name: x\n{said.lstrip('# ')}\n")
    observe = load_recipe(str(recipe)).observe
    assert observe.metrics_address == "0.0.0.0" and endpoint["path"] == "/metrics"
    for pod in [*heads, one_node]:
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert ports[endpoint["port"]] == observe.metrics_port


def test_every_file_for_clusters_says_where_it_has_been_run() -> None:
    """Before its first setting."""
    files = [path for folder in ("slurm", "ray", "kuberay") for path in (CLUSTER / folder).glob("*.yaml")]
    silent = [path.name for path in files if "# Run where:" not in path.read_text().partition("\ntype:")[0].partition("\napiVersion:")[0]]
    assert len(files) > 12 and set(silent) <= {path.name for path in PATCHES}, silent
