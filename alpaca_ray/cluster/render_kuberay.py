"""cluster.yaml for KubeRay: a RayCluster with all groups, RayJobs for the pipeline and each stage, a RayService.

A RayJob has a cluster of its own with the groups its stage selects, which ends with it: nothing is left that costs
money, and KubeRay tries again on a new one. The stages resume.
"""

from collections.abc import Collection
from typing import Any

import yaml

from alpaca_ray.cluster.render_gcp import is_spot
from alpaca_ray.cluster.render_options import RenderOptions, pod_size, read_options
from alpaca_ray.cluster.start_commands import variables
from alpaca_ray.config import STAGES, Placement, RunConfig, UserError

API = "ray.io/v1"
GROUP = "alpaca-ray.io/group"
MARKET = "alpaca-ray.io/market"
CODE = "/home/ubuntu/alpaca_ray"  # in the image
USER_ID = 1000  # of the image
JOB_RETRIES = 2  # each begins a new cluster, and goes on where the last one ended
LOGS_KEPT_S = 600  # between a job's end and its cluster's: time to read what the dashboard shows
PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, "serve": 8000, "metrics": 8080}

Manifest = dict[str, Any]


def render_kuberay(definition: Manifest, run: RunConfig, serve_config: Manifest) -> dict[str, Manifest]:
    """Manifests by the name of their file. `run` is the recipe that `metadata.render.recipe` names.

    Raises UserError for an instance type of unknown size, or a stage that selects a group that is not there.
    """
    options = read_options(definition)
    name = definition["cluster_name"]
    workers = sorted(definition["available_node_types"].keys() - {definition["head_node_type"]})
    manifests = {"raycluster": _manifest("RayCluster", name, _cluster(definition, options, workers, durable=True))}
    groups = {stage: [_group_of_stage(stage, run, definition, options)] for stage in STAGES}
    groups["pipeline"] = sorted({group for own in groups.values() for group in own})
    for job, own in groups.items():
        spec = _job(job, options) | {"rayClusterSpec": _cluster(definition, options, own, durable=False)}
        manifests[f"rayjob-{job}"] = _manifest("RayJob", f"{name}-{job}", spec)
    server = _cluster(definition, options, [_group_of({GROUP: "serve"}, definition, "the server")], durable=True)
    spec = {
        "rayClusterConfig": server,
        "serveConfigV2": _serve_config(serve_config, f"{options.storage_path}/{run.name}/train/model"),
    }
    manifests["rayservice"] = _manifest("RayService", f"{name}-serve", spec)
    return manifests


def _manifest(kind: str, name: str, spec: Manifest) -> Manifest:
    return {"apiVersion": API, "kind": kind, "metadata": {"name": name}, "spec": spec}


def _group_of_stage(stage: str, run: RunConfig, definition: Manifest, options: RenderOptions) -> str:
    placement: Placement = getattr(run, stage).placement
    return _group_of(placement.label_selector, definition, f"recipe {options.recipe}: {stage}")


def _group_of(selector: dict[str, str], definition: Manifest, who: str) -> str:
    """The node type whose labels fulfil the selector."""
    for name, kind in definition["available_node_types"].items():
        if selector and selector.items() <= kind.get("labels", {}).items():
            return str(name)
    raise UserError(f"{who} selects {selector or 'no label'}: no group of cluster.yaml has that")


def _job(stage: str, options: RenderOptions) -> Manifest:
    command = f"python {CODE}/jobs/{stage}.py --recipe {options.recipe} --storage-path {options.storage_path}"
    return {
        "entrypoint": command,
        "backoffLimit": JOB_RETRIES,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": LOGS_KEPT_S,
    }


def _cluster(definition: Manifest, options: RenderOptions, groups: Collection[str], durable: bool) -> Manifest:
    idle_s = int(definition.get("idle_timeout_minutes", 5) * 60)
    autoscaler = {"version": "v2", "idleTimeoutSeconds": idle_s, "upscalingMode": "Default"}
    spec = {
        "rayVersion": options.ray_version,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": autoscaler,
        "authOptions": {"mode": _auth_mode(definition)},
        "headGroupSpec": _head(definition, options),
        "workerGroupSpecs": [_worker_group(name, definition, options, idle_s) for name in groups],
    }
    # A job's head that dies fails the job, whatever the head remembers: KubeRay begins anew, and the stage resumes.
    return spec | ({"gcsFaultToleranceOptions": _head_state(options)} if durable else {})


def _auth_mode(definition: Manifest) -> str:
    given = {variable.name: variable.value for variable in variables(definition["head_start_ray_commands"])}
    return given.get("RAY_AUTH_MODE") or "disabled"


def _head_state(options: RenderOptions) -> Manifest:
    """Where the head keeps its state. A disk's claim is deleted with the cluster: it costs money."""
    kuberay = options.kuberay
    if kuberay.gcs_backend == "redis":
        password = {"valueFrom": {"secretKeyRef": {"name": kuberay.redis_secret, "key": "password"}}}
        redis = {"backend": "redis", "redisAddress": kuberay.redis_address}
        return redis | ({"redisPassword": password} if kuberay.redis_secret is not None else {})
    storage = {"size": kuberay.gcs_storage, "accessModes": ["ReadWriteOnce"], "deletionPolicy": "DeleteWithCluster"}
    if kuberay.storage_class is not None:
        storage["storageClassName"] = kuberay.storage_class
    return {"backend": "rocksdb", "storage": storage}


def _head(definition: Manifest, options: RenderOptions) -> Manifest:
    name = definition["head_node_type"]
    kind = definition["available_node_types"][name]
    # Not loopback, as on machines: KubeRay hands jobs and applications over through the head's service, and the kubelet
    # asks from outside. The service is ClusterIP, the token is asked of everyone, and there is no ingress.
    start = {"num-cpus": str(kind["resources"].get("CPU", 0)), "dashboard-host": "0.0.0.0"}
    template = _pod(name, definition, options)
    ports = [{"name": port, "containerPort": number} for port, number in PORTS.items()]
    template["spec"]["containers"][0]["ports"] = ports
    labels = kind.get("labels", {})
    return {"serviceType": "ClusterIP", "rayStartParams": start, "labels": labels, "template": template}


def _worker_group(name: str, definition: Manifest, options: RenderOptions, idle_s: int) -> Manifest:
    kind = definition["available_node_types"][name]
    resources = kind["resources"]
    # A pod asks Kubernetes for less than its machine has; Ray counts all of it, as on machines.
    start = {"num-cpus": str(resources.get("CPU", 0)), "num-gpus": str(resources.get("GPU", 0))}
    return {
        "groupName": name,
        "replicas": kind.get("min_workers", 0),
        "minReplicas": kind.get("min_workers", 0),
        "maxReplicas": kind.get("max_workers", definition["max_workers"]),
        "idleTimeoutSeconds": int(kind.get("idle_timeout_s", idle_s)),
        "labels": kind.get("labels", {}),
        "rayStartParams": start,
        "template": _pod(name, definition, options),
    }


def _pod(group: str, definition: Manifest, options: RenderOptions) -> Manifest:
    is_head = group == definition["head_node_type"]
    kind = definition["available_node_types"][group]
    commands = definition["head_start_ray_commands" if is_head else "worker_start_ray_commands"]
    asked = _requests(kind, options)
    ray = {
        "name": "ray-head" if is_head else "ray-worker",
        "image": definition["docker"]["image"],
        "imagePullPolicy": "IfNotPresent",
        "env": _environment(commands),
        # No limit on CPUs: what the others leave is used. Ray sizes its memory by the limit.
        "resources": {"requests": asked, "limits": {key: value for key, value in asked.items() if key != "cpu"}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec = {
        "containers": [ray],
        "restartPolicy": "Never",  # the autoscaler's second version takes a restarted pod for the node that died
        "nodeSelector": options.kuberay.node_selectors.get(group, kind.get("labels", {})),
        "tolerations": _tolerations(kind),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    account = kind["node_config"].get("IamInstanceProfile", {}).get("Name")
    return {"spec": spec | ({"serviceAccountName": account} if account else {})}


def _requests(kind: Manifest, options: RenderOptions) -> dict[str, str]:
    size = pod_size(kind["node_config"]["InstanceType"], options.kuberay)
    asked = {"cpu": f"{size.num_cpus:g}", "memory": f"{size.memory_gib}Gi"}
    num_gpus = kind["resources"].get("GPU", 0)
    return asked | ({"nvidia.com/gpu": str(num_gpus)} if num_gpus else {})


def _environment(commands: list[str]) -> list[Manifest]:
    """Secrets by name only. KubeRay sets RAY_AUTH_MODE and the token; `version: v2` chooses the autoscaler."""
    environment: list[Manifest] = []
    for variable in variables(commands):
        if variable.name in ("RAY_AUTH_MODE", "RAY_enable_autoscaler_v2"):
            continue
        if variable.secret is None:
            environment.append({"name": variable.name, "value": variable.value})
        else:
            reference = {"name": variable.secret, "key": "value"}
            environment.append({"name": variable.name, "valueFrom": {"secretKeyRef": reference}})
    return environment


def _tolerations(kind: Manifest) -> list[Manifest]:
    """Of the taints that keep others off GPU and spot nodes. GKE taints its spot nodes itself where they have GPUs."""
    tolerations = []
    if kind["resources"].get("GPU", 0):
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if is_spot(kind):
        spot = {"operator": "Equal", "effect": "NoSchedule"}
        tolerations.append({"key": MARKET, "value": "spot"} | spot)
        tolerations.append({"key": "cloud.google.com/gke-spot", "value": "true"} | spot)
    return tolerations


def _serve_config(shipped: Manifest, model: str) -> str:
    """serve_config.yaml as a server on GPU pods: behind the service, with the recipe's model.

    KubeRay takes a worker without a proxy for a server that is not ready, so every node has one. It listens on all of
    the pod's addresses; the application refuses that without API keys, which come from a Secret.
    """
    config = shipped | {"proxy_location": "EveryNode"}
    config["http_options"] = shipped.get("http_options", {}) | {"host": "0.0.0.0"}
    config["applications"] = [_application(one, model) for one in shipped["applications"]]
    return yaml.safe_dump(config, sort_keys=True, width=120)


def _application(shipped: Manifest, model: str) -> Manifest:
    placement = {"num_cpus": 4, "num_gpus": 1, "label_selector": {GROUP: "serve"}}
    args = shipped["args"] | {"model": model, "dtype": "bfloat16", "placement": placement}
    return shipped | {"args": args}
