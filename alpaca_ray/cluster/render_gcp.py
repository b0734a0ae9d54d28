"""cluster.yaml for Ray's provider on Google's cloud: the same groups, image and commands on Google's machines."""

import copy
from typing import Any

from alpaca_ray.cluster.machine_types import GcpMachine
from alpaca_ray.cluster.render_options import GcpOptions, gcp_machine, read_options
from alpaca_ray.cluster.start_commands import for_gcp
from alpaca_ray.config import UserError

DISK_GB = 100  # where cluster.yaml names no disk: the image with its CUDA libraries takes 15 GB, twice while unpacked
DISK_TYPES = {"gp2": "pd-balanced", "gp3": "pd-balanced", "io1": "pd-ssd", "io2": "pd-ssd", "st1": "pd-standard"}
# What an account may do is decided by its roles; Google advises this scope with accounts of one's own.
SCOPES = ["https://www.googleapis.com/auth/cloud-platform"]


def render_gcp(definition: dict[str, Any]) -> dict[str, Any]:
    """Raises UserError for an instance type without a machine of Google's, or with one that is too small."""
    options = read_options(definition).gcp
    rendered = copy.deepcopy(definition)
    rendered.pop("metadata")
    rendered["provider"] = {
        "type": "gcp",
        "project_id": options.project_id,
        "region": options.region,
        "availability_zone": options.availability_zone,
        "cache_stopped_nodes": definition["provider"].get("cache_stopped_nodes", False),
    }
    for name, kind in rendered["available_node_types"].items():
        kind["node_config"] = _node_config(name, kind, options)
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        rendered[commands] = for_gcp(definition[commands])
    return rendered


def _node_config(name: str, kind: dict[str, Any], options: GcpOptions) -> dict[str, Any]:
    aws = kind["node_config"]
    machine = gcp_machine(aws["InstanceType"], options)
    if kind["resources"].get("CPU", 0) > machine.num_cpus:
        raise UserError(
            f"cluster.yaml: {name}: {machine.machine_type} has {machine.num_cpus} CPUs, resources ask for "
            f"{kind['resources']['CPU']}: name a larger one in metadata.render.gcp.machine_types"
        )
    account = aws.get("IamInstanceProfile", {}).get("Name", "default")
    config = {
        "machineType": machine.machine_type,
        "disks": [_disk(aws, options)],
        "serviceAccounts": [{"email": _email(account, options), "scopes": SCOPES}],
    }
    scheduling = _scheduling(is_spot(kind), kind["resources"].get("GPU", 0) > 0)
    return config | _accelerators(machine) | ({"scheduling": scheduling} if scheduling else {})


def is_spot(kind: dict[str, Any]) -> bool:
    """Whether cluster.yaml takes the nodes of this type from the spot market."""
    market = kind["node_config"].get("InstanceMarketOptions", {})
    return bool(market.get("MarketType") == "spot")


def _email(account: str, options: GcpOptions) -> str:
    return account if account == "default" else f"{account}@{options.project_id}.iam.gserviceaccount.com"


def _disk(aws: dict[str, Any], options: GcpOptions) -> dict[str, Any]:
    mappings = aws.get("BlockDeviceMappings") or [{}]
    volume = mappings[0].get("Ebs", {})
    disk_type = DISK_TYPES.get(volume.get("VolumeType", "gp3"), "pd-balanced")
    parameters = {
        "diskSizeGb": volume.get("VolumeSize", DISK_GB),
        "diskType": f"zones/{options.availability_zone}/diskTypes/{disk_type}",
        "sourceImage": options.source_image,
    }
    return {"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": parameters}


def _scheduling(spot: bool, has_gpus: bool) -> dict[str, Any]:
    """Machines with GPUs cannot move to another host; a spot machine that was only stopped would cost its disk."""
    if spot:
        market = {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
        return market | {"onHostMaintenance": "TERMINATE", "automaticRestart": False}
    return {"onHostMaintenance": "TERMINATE", "automaticRestart": False} if has_gpus else {}


def _accelerators(machine: GcpMachine) -> dict[str, Any]:
    if machine.accelerator is None:
        return {}
    return {
        "guestAccelerators": [{"acceleratorType": machine.accelerator, "acceleratorCount": machine.num_accelerators}]
    }
