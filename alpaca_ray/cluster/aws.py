"""What Ray's AWS provider and EC2 itself read of a cluster.yaml: names, types, regions, sizes.

`provider`: the keys that ray 2.60 reads (autoscaler/_private/aws/config.py, node_provider.py and cloudwatch/, and
autoscaler.py for all clouds). `node_config`: botocore's own model of RunInstances, which is what Ray calls with it.
"""

import re
from functools import cache
from importlib import resources
from typing import Any

import yaml

MISSING = "node_config is not checked: botocore is not installed here (pip install 'alpaca-ray[cluster]')"

_TEXT, _FLAG, _MAP = {"type": "string"}, {"type": "boolean"}, {"type": "object"}


def _closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, "required": list(required)}


_FILE = _closed({"config": {"type": ["string", "null"]}})
ANY_CLOUD = {
    "type": _TEXT,
    "disable_node_updaters": _FLAG,
    "disable_launch_config_check": _FLAG,
    "foreground_node_launch": _FLAG,
    "worker_liveness_check": _FLAG,
}
PROVIDER = _closed(
    ANY_CLOUD
    | {
        "region": _TEXT,
        "availability_zone": _TEXT,
        "cache_stopped_nodes": _FLAG,
        "use_internal_ips": _FLAG,
        "key_pair": _closed({"key_name": _TEXT}, "key_name"),
        "security_group": _closed({"GroupName": _TEXT, "IpPermissions": {"type": "array", "items": _MAP}}),
        "aws_credentials": _closed(
            {"aws_access_key_id": _TEXT, "aws_secret_access_key": _TEXT, "aws_session_token": _TEXT}
        ),
        "cloudwatch": _closed(
            {
                "agent": _closed({"config": _TEXT, "retryer": _MAP}),
                "dashboard": _closed({"name": {"type": ["string", "null"]}, **_FILE["properties"]}),
                "alarm": _FILE,
            }
        ),
    },
    "type",
    "region",
)
# Ray sets these by itself, so they are not asked for.
_SET_BY_RAY = {"MinCount", "MaxCount"}
# Ray's own, beside RunInstances': it tries one subnet after the other.
_OF_RAY = {"SubnetIds": {"type": "array", "items": _TEXT}}


def has_botocore() -> bool:
    """Whether `node_config` can be checked here."""
    try:
        import botocore.session  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def node_schema() -> dict[str, Any]:
    """The JSON schema of `node_config`. Needs botocore."""
    import botocore.session

    schema = _of_shape(botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape)
    schema["properties"] |= _OF_RAY
    schema["required"] = [name for name in schema["required"] if name not in _SET_BY_RAY]
    return schema


@cache
def regions() -> list[str]:
    """Regions of EC2 in all partitions. Needs botocore."""
    import botocore.session

    session = botocore.session.Session()
    return [name for part in session.get_available_partitions() for name in session.get_available_regions("ec2", part)]


def size_of(instance_type: str) -> tuple[int, int] | None:
    """vCPUs and GPUs; None for a type that is not in the table."""
    table = _instances()
    family, _, size = instance_type.partition(".")
    found = re.fullmatch(r"(\d*)xlarge|large", size)
    gpus = 0 if family in table["without_gpus"] else table["gpus"].get(family, {}).get(size)
    if found is None or gpus is None:
        return None
    return (2 if size == "large" else 4 * int(found[1] or 1)), gpus


@cache
def _instances() -> dict[str, Any]:
    text = (resources.files("alpaca_ray.cluster") / "aws_instances.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def _of_shape(shape: Any) -> dict[str, Any]:
    if shape.type_name == "structure":
        members = {name: _of_shape(member) for name, member in shape.members.items()}
        return _closed(members, *shape.required_members)
    if shape.type_name == "list":
        return {"type": "array", "items": _of_shape(shape.member)}
    if shape.type_name == "string":
        return {"type": "string"} | ({"enum": list(shape.enum)} if shape.enum else {})
    kinds = {"integer": {"type": "integer"}, "long": {"type": "integer"}, "boolean": _FLAG, "map": _MAP}
    return dict(kinds.get(shape.type_name, {}))  # a time may be text or a date
