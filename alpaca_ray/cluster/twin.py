"""The local twin: a real head under Ray's autoscaler on this machine, and the groups of cluster.yaml as fake nodes."""

import shlex
from pathlib import Path
from typing import Any

import psutil
import yaml

from alpaca_ray.cluster import local
from alpaca_ray.cluster.render_local import LocalScale, head_environment, render_local
from alpaca_ray.config import UserError

# What a fake node takes before any work (raylet, two agents, log monitor: 222 MB), and the head with its dashboard
# (918 MB).
NODE_MB, HEAD_MB = 250, 1000
START_TIMEOUT_S = 300.0


def up(
    directory: Path,
    definition: dict[str, Any],
    num_cpus: int | None = None,
    environment: dict[str, str] | None = None,
    free_mb: int | None = None,
) -> local.LocalCluster:
    """Start the twin; its groups have no nodes yet. `directory` has to be absolute, and gets its autoscaling config.

    `num_cpus`: of a node at most. `environment`: for the head and all nodes. `free_mb`: memory to take, all that is
    available if not given. Raises UserError where that is too little for one node, or if the head does not come up.
    """
    if free_mb is None:
        free_mb = psutil.virtual_memory().available // 2**20
    max_workers = room(definition, LocalScale(), free_mb)
    head = definition["available_node_types"][definition["head_node_type"]]
    config = directory / "autoscaling.yaml"

    def options(gcs_port: int) -> list[str]:
        directory.mkdir(parents=True, exist_ok=True)
        scale = LocalScale(num_cpus=num_cpus, max_workers=max_workers, gcs_port=gcs_port)
        config.write_text(yaml.safe_dump(render_local(definition, scale)), encoding="utf-8")
        labels = ",".join(f"{key}={value}" for key, value in head.get("labels", {}).items())
        return [f"--autoscaling-config={config}", *([f"--labels={labels}"] if labels else [])]

    settings = head_environment() | (environment or {})
    return local.start(directory, head["resources"].get("CPU", 0), settings, START_TIMEOUT_S, options)


def room(definition: dict[str, Any], scale: LocalScale, free_mb: int) -> int:
    """Nodes that there may be at once: as many as the definition lets there be, or as the memory has room for.

    Raises UserError where there is none for a single one.
    """
    each_mb = NODE_MB + scale.object_store_mb
    fits = (free_mb - HEAD_MB) // each_mb
    if fits < 1:
        raise UserError(
            f"the twin needs {HEAD_MB + each_mb} MB of memory for its head and one node, and {max(free_mb, 0)} MB are "
            "available: end what else runs here"
        )
    return min(fits, most_nodes(definition))


def most_nodes(definition: dict[str, Any]) -> int:
    """Nodes that the definition lets there be at once, the head not counted."""
    most: int = definition["max_workers"]
    groups = [kind for name, kind in definition["available_node_types"].items() if name != definition["head_node_type"]]
    return min(most, sum(int(kind.get("max_workers", most)) for kind in groups))


def down(directory: Path) -> bool:
    """End the twin of this directory and all its nodes, also where its head has died. False: there was none."""
    cluster = local.recorded(directory)
    if cluster is None:
        return False
    local.stop(cluster)
    return True


def limit(cluster: local.LocalCluster) -> int:
    """Nodes that this twin has at most at once."""
    most: int = _config(cluster)["max_workers"]
    return most


def describe(cluster: local.LocalCluster) -> str:
    """Where it is, what it may grow to, and how Ray's own commands reach it."""
    config = _config(cluster)
    lines = [f"dashboard {cluster.dashboard}; at most {config['max_workers']} nodes at once:"]
    for name, kind in config["available_node_types"].items():
        if name != config["head_node_type"]:
            resources = ", ".join(
                f"{kind['resources'][key]} {key}" for key in ("CPU", "GPU") if key in kind["resources"]
            )
            lines.append(f"  {name:<10} {kind['min_workers']} to {kind['max_workers']} nodes of {resources}")
    exports = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(Path(cluster.directory) / "token"),
        "RAY_ADDRESS": f"127.0.0.1:{cluster.gcs_port}",
        "RAY_API_SERVER_ADDRESS": cluster.dashboard,
        "RAY_DASHBOARD_ADDRESS": cluster.dashboard,
    }
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    return "\n".join(lines)


def _config(cluster: local.LocalCluster) -> dict[str, Any]:
    text = (Path(cluster.directory) / "autoscaling.yaml").read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    return config
