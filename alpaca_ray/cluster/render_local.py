"""The local twin: the shipped groups as fake nodes of one machine, under Ray's real autoscaler.

The head has to be started with the variables of `head_environment`.
"""

from dataclasses import dataclass
from typing import Any

# Ray's provider looks these up by name (ray/autoscaler/_private/fake_multi_node/node_provider.py).
HEAD_TYPE = "ray.head.default"
HEAD_NODE_ID = "FAKE_HEAD_NODE_ID"
PROVIDER = "alpaca_ray.cluster.twin_nodes.TwinNodeProvider"
# Ray fills these from defaults where they are missing: with commands that install a nightly Ray, and mounts.
EMPTY_LISTS = (
    "cluster_synced_files", "head_setup_commands", "head_start_ray_commands", "initialization_commands",
    "rsync_exclude", "rsync_filter", "setup_commands", "worker_setup_commands", "worker_start_ray_commands",
)  # fmt: skip
EMPTY_MAPPINGS = ("auth", "docker", "file_mounts")


@dataclass(frozen=True)
class LocalScale:
    """How much of a laptop the twin takes. CPUs and GPUs are names there: no node computes because it has them."""

    num_cpus: int | None = None  # a node has at most; None: as many as in cluster.yaml
    max_workers: int | None = None  # nodes at once, in all groups together; None: as many as in cluster.yaml
    object_store_mb: int = 100  # a node; Ray's own choice would be 30 % of the machine, for each
    idle_timeout_s: float = 5.0  # of every group: nobody waits minutes for a test
    gcs_port: int = 6379


def render_local(definition: dict[str, Any], scale: LocalScale) -> dict[str, Any]:
    """The autoscaling config for `ray start --head --autoscaling-config`. Groups, labels and limits are as shipped."""
    head = definition["head_node_type"]
    types = {
        HEAD_TYPE if name == head else name: _node_type(kind, scale, definition["max_workers"], name == head)
        for name, kind in definition["available_node_types"].items()
    }
    provider = {
        "type": "external",
        "module": PROVIDER,
        "head_node_id": HEAD_NODE_ID,
        "launch_multiple": True,
        "gcs_address": f"127.0.0.1:{scale.gcs_port}",
    }
    kept = {key: definition[key] for key in ("cluster_name", "max_workers", "upscaling_speed") if key in definition}
    if scale.max_workers is not None:
        kept["max_workers"] = min(kept["max_workers"], scale.max_workers)
    empty: dict[str, Any] = {key: [] for key in EMPTY_LISTS} | {key: {} for key in EMPTY_MAPPINGS}
    return (
        kept
        | empty
        | {
            "idle_timeout_minutes": scale.idle_timeout_s / 60,
            "provider": provider,
            "available_node_types": types,
            "head_node_type": HEAD_TYPE,
            "file_mounts_sync_continuously": False,
        }
    )


def head_environment() -> dict[str, str]:
    """What the head's process needs in its environment, so that the provider knows it as its own."""
    return {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID,
        # Else each node would begin with a Python process for each of its CPUs.
        "RAY_prestart_worker_first_driver": "0",
    }


def _node_type(kind: dict[str, Any], scale: LocalScale, max_workers: int, is_head: bool) -> dict[str, Any]:
    resources = dict(kind["resources"])
    if scale.num_cpus is not None:
        resources["CPU"] = min(resources.get("CPU", 0), scale.num_cpus)
    if not is_head:
        resources["object_store_memory"] = scale.object_store_mb * 2**20
    return {
        "resources": resources,
        "labels": kind.get("labels", {}),
        "node_config": {},
        "min_workers": kind.get("min_workers", 0),
        "max_workers": 0 if is_head else kind.get("max_workers", max_workers),
    }
