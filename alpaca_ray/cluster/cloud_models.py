"""node_config of a cluster file against the cloud's own model of a machine, with no network.

AWS: what botocore knows about RunInstances. Google's cloud: the discovery document that google-api-python-client
carries. Ray lets anything through to the cloud, which says no when the node is wanted.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alpaca_ray.cluster.strict_schema import problems
from alpaca_ray.config import UserError, nearest

# What Ray itself takes from node_config before the rest goes to AWS (ray/autoscaler/_private/aws/node_provider.py).
RAYS_OWN = {"SubnetIds"}
SCALARS: dict[str, tuple[type, ...]] = {
    "string": (str,), "boolean": (bool,),
    "integer": (int,), "long": (int,), "float": (int, float), "double": (int, float),
}  # fmt: skip
GCP_DOCUMENT = Path("discovery_cache", "documents", "compute.v1.json")


def _node_settings(definition: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """node_config by node type. Raises UserError where there is none."""
    types = definition.get("available_node_types")
    if not isinstance(types, dict) or not types:
        raise UserError("available_node_types is missing: it has to name the groups")
    without = [name for name, kind in types.items() if not isinstance((kind or {}).get("node_config"), dict)]
    if without:
        raise UserError(f"available_node_types.{without[0]}.node_config is missing, or no mapping")
    return {name: kind["node_config"] for name, kind in types.items()}


def aws_problems(definition: dict[str, Any]) -> list[str]:
    """Raises UserError where botocore is not installed."""
    try:
        from botocore.session import get_session
    except ImportError:
        raise UserError("AWS node settings are checked with botocore: pip install botocore") from None
    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    found: list[str] = []
    for name, settings in _node_settings(definition).items():
        ours = {key: value for key, value in settings.items() if key not in RAYS_OWN}
        found += _against(ours, shape, f"available_node_types.{name}.node_config")
    return found


def _against(value: Any, shape: Any, path: str) -> Iterator[str]:
    """The walk of botocore's ParamValidator, which gives neither paths to unknown keys nor a look at enumerations."""
    if shape.type_name == "structure" and isinstance(value, dict):
        for key, inner in value.items():
            if key in shape.members:
                yield from _against(inner, shape.members[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}: no such field{nearest(key, list(shape.members))}"
    elif shape.type_name == "list" and isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _against(inner, shape.member, f"{path}[{index}]")
    elif not _is_scalar(value, shape.type_name):
        yield f"{path}: {value!r} is no {shape.type_name}"
    elif getattr(shape, "enum", []) and "InstanceType" not in path and value not in shape.enum:
        # New instance types are older than the botocore that knows them.
        yield f"{path}: no such value {value!r}{nearest(str(value), shape.enum)}"


def _is_scalar(value: Any, type_name: str) -> bool:
    """Whether it is one of the type; blobs and times, which no node needs, pass. True is no number."""
    if type_name in ("structure", "list"):
        return False
    if isinstance(value, bool):
        return type_name == "boolean"
    return isinstance(value, SCALARS.get(type_name, (object,)))


def gcp_problems(definition: dict[str, Any]) -> list[str]:
    """Raises UserError where google-api-python-client is not installed."""
    package = importlib.util.find_spec("googleapiclient")
    if package is None or package.origin is None:
        raise UserError(
            "Google's node settings are checked with its client library: pip install google-api-python-client"
        )
    document = json.loads((Path(package.origin).parent / GCP_DOCUMENT).read_text(encoding="utf-8"))
    return against_discovery(definition, document)


def against_discovery(definition: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """`document`: the discovery document of Compute Engine."""
    schema = {"$ref": "#/$defs/Instance", "$defs": _json_schema(document["schemas"])}
    found = []
    for name, settings in _node_settings(definition).items():
        path = f"available_node_types.{name}.node_config"
        found += [f"{path}.{line}" for line in problems(settings, schema)]
    return found


def _json_schema(discovery: Any) -> Any:
    """Google's dialect as a JSON schema: references without a path, and 64-bit numbers that are called strings."""
    if isinstance(discovery, list):
        return [_json_schema(item) for item in discovery]
    if not isinstance(discovery, dict):
        return discovery
    if isinstance(discovery.get("$ref"), str):
        return {"$ref": f"#/$defs/{discovery['$ref']}"}
    schema = {key: _json_schema(value) for key, value in discovery.items() if key not in ("default", "id")}
    if schema.get("type") == "string" and schema.get("format") in ("int64", "uint64"):
        schema["type"] = ["string", "integer"]
    return schema
