"""What KubeRay's operator refuses beyond the field shapes (v1.7 line), and what these files promise: each rule yields what breaks it, in words."""

import re
from collections.abc import Iterator, Mapping
from typing import Any  # parsed YAML, whose shape kuberay_schema has checked

Document = Mapping[str, Any]

NAME_LENGTHS = {"RayCluster": 63 - len("-head-svc"), "RayJob": 47, "RayService": 47}
DNS_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
LABEL_VALUE = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")
RAY_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
GPU = "nvidia.com/gpu"


def cluster_of(document: Document) -> Document:
    """The RayClusterSpec inside a RayCluster, RayJob or RayService."""
    spec = document["spec"]
    inner = {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}
    return inner[document["kind"]] or {}


def groups_of(cluster: Document) -> list[tuple[str, Document]]:
    return [("head", cluster["headGroupSpec"])] + [
        (group["groupName"], group) for group in cluster.get("workerGroupSpecs", [])
    ]


def operator_rules(document: Document) -> Iterator[str]:
    """The admission rules of the operator for one resource."""
    kind, name, spec = document["kind"], document["metadata"]["name"], document["spec"]
    if not DNS_1035.match(name) or len(name) > NAME_LENGTHS[kind]:
        yield f"{kind} {name}: the name is no DNS-1035 label of at most {NAME_LENGTHS[kind]} characters"
    if kind == "RayJob":
        yield from job_rules(spec)
    cluster = cluster_of(document)
    if cluster:
        yield from cluster_rules(cluster)


def job_rules(spec: Document) -> Iterator[str]:
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    mode = spec.get("submissionMode", "K8sJobMode")
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("suspend") and not shutdown:
        yield "suspend needs shutdownAfterJobFinishes"
    if bool(spec.get("clusterSelector")) == bool(spec.get("rayClusterSpec")):
        yield "exactly one of clusterSelector and rayClusterSpec must be set"
    if spec.get("clusterSelector") and (spec.get("suspend") or spec.get("backoffLimit")):
        yield "clusterSelector excludes suspend and backoffLimit"
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "InteractiveMode excludes backoffLimit"
    if mode == "SidecarMode" and (
        spec.get("submitterPodTemplate") or spec.get("submitterConfig") or spec.get("clusterSelector")
    ):
        yield "SidecarMode excludes submitterPodTemplate, submitterConfig and clusterSelector"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield f"{key} must be positive"


def cluster_rules(cluster: Document) -> Iterator[str]:
    auth, version = cluster.get("authOptions", {}), cluster.get("rayVersion", "")
    if auth.get("mode", "disabled" if not auth else "token") == "token":
        numbers = re.match(r"^(\d+)\.(\d+)\.(\d+)$", version)
        if not numbers or tuple(map(int, numbers.groups())) < (2, 52, 0):
            yield f"token auth needs rayVersion 2.52.0 or later, given {version!r}"
    scaling = bool(cluster.get("enableInTreeAutoscaling"))
    v2 = scaling and cluster.get("autoscalerOptions", {}).get("version") == "v2"
    names = [name for name, _ in groups_of(cluster)]
    if len(set(names)) != len(names):
        yield "two groups have one name"
    for name, group in groups_of(cluster):
        yield from group_rules(name, group, scaling=scaling, v2=v2)


def group_rules(name: str, group: Document, *, scaling: bool, v2: bool) -> Iterator[str]:
    start, pod = group.get("rayStartParams", {}), group["template"]["spec"]
    if group.get("resources") and any(key in start for key in RAY_RESOURCES):
        yield f"{name}: resources are set in both rayStartParams and resources"
    if "labels" in start:
        yield f"{name}: rayStartParams.labels is not supported, use labels"
    for key, value in group.get("labels", {}).items():
        if not LABEL_VALUE.match(value) or len(value) > 63:
            yield f"{name}: label {key}={value!r} is no Kubernetes label"
    if name != "head" and not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get(
        "maxReplicas", 2**31 - 1
    ):
        yield f"{name}: minReplicas <= replicas <= maxReplicas does not hold"
    if scaling and group.get("suspend"):
        yield f"{name}: a group cannot be suspended while the autoscaler runs"
    if group.get("idleTimeoutSeconds") is not None and not v2:
        yield f"{name}: idleTimeoutSeconds of a group needs the v2 autoscaler"
    if v2 and pod.get("restartPolicy", "Never") != "Never":
        yield f"{name}: restartPolicy must be Never or unset with the v2 autoscaler"
    for variable in pod["containers"][0].get("env", []):
        if variable["name"] == "RAY_enable_autoscaler_v2":
            yield f"{name}: RAY_enable_autoscaler_v2 must not be set by hand"
        if variable["name"] in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"):
            yield f"{name}: {variable['name']} belongs in gcsFaultToleranceOptions"


def own_rules(
    document: Document, *, claims: set[str], secrets: Mapping[str, set[str]], ray_version: str
) -> Iterator[str]:
    """What these files promise: one Ray, token auth, the shared volume and /dev/shm everywhere, GPU pods where GPUs are, secrets by reference."""
    cluster = cluster_of(document)
    if cluster.get("rayVersion") != ray_version:
        yield f"rayVersion {cluster.get('rayVersion')} is not the project's {ray_version}"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "token auth is not on"
    images = {
        container["image"] for _, group in groups_of(cluster) for container in group["template"]["spec"]["containers"]
    }
    if len(images) != 1:
        yield f"head and workers run different images: {sorted(images)}"
    if cluster["headGroupSpec"].get("rayStartParams", {}).get("num-cpus") != "0":
        yield "the head must take no work (num-cpus 0)"
    for name, group in groups_of(cluster):
        yield from pod_rules(name, group["template"]["spec"], claims=claims, secrets=secrets)


def pod_rules(name: str, pod: Document, *, claims: set[str], secrets: Mapping[str, set[str]]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim")
        if claim and claim["claimName"] not in claims:
            yield f"{name}: no claim {claim['claimName']!r} in storage.yaml"
    container = pod["containers"][0]
    mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
    for path, volume_name in mounts.items():
        if volume_name not in volumes:
            yield f"{name}: {path} mounts the unknown volume {volume_name!r}"
    if "persistentVolumeClaim" not in volumes.get(mounts.get("/shared", ""), {}):
        yield f"{name}: the shared volume is not mounted at /shared"
    if volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {}).get("medium") != "Memory":
        yield f"{name}: /dev/shm is not a memory volume: Ray's object store would fall back to the disk"
    for variable in container.get("env", []):
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference and reference["key"] not in secrets.get(reference["name"], set()):
            yield f"{name}: {variable['name']} refers to {reference['name']}/{reference['key']}, which secrets.example.yaml does not have"
        if reference is None and re.search(r"KEY|TOKEN|SECRET|PASSWORD", variable["name"]):
            yield f"{name}: {variable['name']} looks like a secret and stands in the open"
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    if limits.get("memory") != requests.get("memory"):
        yield f"{name}: memory request and limit differ: Ray sees the limit, the node keeps the request"
    tolerated = any(item.get("key") == GPU for item in pod.get("tolerations", []))
    if (GPU in limits) != tolerated:
        yield f"{name}: GPU limit and GPU toleration must come together"
    if limits.get(GPU) != requests.get(GPU):
        yield f"{name}: GPU request and limit differ"
