"""Schemas that find unknown keys; node settings against small models of the clouds, and the real ones if installed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from alpaca_ray.cluster.cloud_models import against_discovery, aws_problems, gcp_problems
from alpaca_ray.cluster.strict_schema import problems
from alpaca_ray.cluster.validate import read_schemas, validate
from alpaca_ray.config import UserError

ROOT = Path(__file__).parents[2]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["size"],
            "properties": {
                "size": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "free": {"type": "object", "properties": {"a": {}}, "x-kubernetes-preserve-unknown-fields": True},
                "items": {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"}}}},
                "properties": {"type": "object", "properties": {"inner": {"type": "integer"}}},
            },
        },
    },
}


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ({"size": 1, "labels": {"any": "x"}, "free": {"b": 2}, "items": [{"name": "n"}]}, []),
        ({"size": "1"}, []),
        ({"size": 1, "properties": {"inner": 1}}, []),
        ({"size": 1, "lables": {}}, ["spec.lables: no such field; did you mean 'labels'?"]),
        ({"size": 1, "items": [{}, {"nmae": ""}]}, ["spec.items[1].nmae: no such field; did you mean 'name'?"]),
        ({"size": 1, "properties": {"iner": 1}}, ["spec.properties.iner: no such field; did you mean 'inner'?"]),
        ({"size": 1, "zzz": 1, "yyy": 1}, ["spec.yyy: no such field", "spec.zzz: no such field"]),
        ({}, ["spec: 'size' is a required property"]),
        ({"size": 1, "labels": {"any": 1}}, ["spec.labels.any: 1 is not of type 'string'"]),
    ],
)
def test_open_schemas_are_shut(spec: dict[str, Any], found: list[str]) -> None:
    before = copy.deepcopy(SCHEMA)
    assert problems({"kind": "RayJob", "metadata": {"name": "x"}, "spec": spec}, SCHEMA) == found
    assert before == SCHEMA


def test_schemas_are_read_in_both_forms(tmp_path: Path) -> None:
    (tmp_path / "rayjobs.v1.schema.json").write_text(json.dumps(SCHEMA))
    crd = {
        "kind": "CustomResourceDefinition",
        "spec": {
            "names": {"kind": "RayCluster"},
            "versions": [
                {"name": "v1alpha1", "schema": {"openAPIV3Schema": {}}},
                {"name": "v1", "schema": {"openAPIV3Schema": SCHEMA}},
            ],
        },
    }
    (tmp_path / "crds.yaml").write_text(yaml.safe_dump_all([{"kind": "Service"}, crd]))
    assert read_schemas(tmp_path) == {"RayJob": SCHEMA, "RayCluster": SCHEMA}


def test_what_cannot_be_checked_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="helm show crds"):
        read_schemas(tmp_path)
    for text, says in (
        ("kind: RayJob", "no schema for RayJob"),
        ("kind: Pod", "nothing to check Pod against"),
        ("provider: {type: azure}", "nothing to check azure against"),
        ("a: [", "is no YAML"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError, match=says):
            validate(tmp_path / "x.yaml", {})


# Compute Engine's discovery document, in small: the dialect that the real one is written in.
DISCOVERY = {
    "schemas": {
        "Instance": {
            "id": "Instance",
            "type": "object",
            "properties": {
                "machineType": {"type": "string"},
                "disks": {"type": "array", "items": {"$ref": "AttachedDisk"}},
                "scheduling": {"$ref": "Scheduling"},
                "serviceAccounts": {"type": "array", "items": {"type": "object"}},
            },
        },
        "AttachedDisk": {
            "id": "AttachedDisk",
            "type": "object",
            "properties": {
                "boot": {"type": "boolean"},
                "autoDelete": {"type": "boolean"},
                "type": {"type": "string", "enum": ["PERSISTENT", "SCRATCH"]},
                "initializeParams": {
                    "type": "object",
                    "properties": {
                        "diskSizeGb": {"type": "string", "format": "int64"},
                        "diskType": {"type": "string"},
                        "sourceImage": {"type": "string"},
                    },
                },
            },
        },
        "Scheduling": {
            "id": "Scheduling",
            "type": "object",
            "properties": {
                "automaticRestart": {"type": "boolean"},
                "instanceTerminationAction": {"type": "string", "enum": ["DELETE", "STOP"]},
                "onHostMaintenance": {"type": "string", "enum": ["MIGRATE", "TERMINATE"]},
                "provisioningModel": {"type": "string", "enum": ["SPOT", "STANDARD"]},
            },
        },
    }
}


def google() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "gcp" / "cluster.yaml").read_text())
    return content


def aws() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return content


@pytest.mark.parametrize("types", [None, {}, {"head": None}, {"head": {"node_config": []}}])
def test_a_definition_without_node_settings_is_refused(types: Any) -> None:
    with pytest.raises(UserError, match="available_node_types"):
        against_discovery({"available_node_types": types}, DISCOVERY)


GOOGLE_MISTAKES = [  # where, what it becomes, what has to be named
    (("machineTyp",), "x", "node_config.machineTyp: no such field; did you mean 'machineType'?"),
    (("scheduling", "provisioningModel"), "SPOTT", "scheduling.provisioningModel: 'SPOTT' is not one of"),
    (("scheduling", "onHostMaintenence"), "TERMINATE", "did you mean 'onHostMaintenance'?"),
    (("scheduling",), [{"preemptible": True}], "scheduling: [{'preemptible': True}] is not of type 'object'"),
    (("disks", 0, "initializeParams", "diskSizeGB"), 10, "initializeParams.diskSizeGB: no such field; did you mean"),
]


def change(config: Any, where: tuple[str | int, ...], value: Any) -> None:
    for step in where[:-1]:
        config = config[step]
    config[where[-1]] = value


@pytest.mark.parametrize(("where", "value", "says"), GOOGLE_MISTAKES)
def test_mistakes_in_googles_node_settings(where: tuple[str | int, ...], value: Any, says: str) -> None:
    definition = google()
    assert against_discovery(definition, DISCOVERY) == []
    change(definition["available_node_types"]["generate"]["node_config"], where, value)
    (found,) = against_discovery(definition, DISCOVERY)
    assert found.startswith("available_node_types.generate.node_config.")
    assert says in found


@pytest.mark.parametrize(("where", "value", "says"), GOOGLE_MISTAKES)
def test_the_same_by_googles_own_document(where: tuple[str | int, ...], value: Any, says: str) -> None:
    pytest.importorskip("googleapiclient", reason="google-api-python-client (110 MB) is not installed")
    definition = google()
    assert gcp_problems(definition) == []
    change(definition["available_node_types"]["generate"]["node_config"], where, value)
    assert says in gcp_problems(definition)[0]


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (("InstanceTyp",), "x", "node_config.InstanceTyp: no such field; did you mean 'InstanceType'?"),
        (("ImageId",), 3, "node_config.ImageId: 3 is no string"),
        (("InstanceMarketOptions", "MarketTyp"), "spot", "MarketTyp: no such field; did you mean 'MarketType'?"),
        (("InstanceMarketOptions", "MarketType"), "spott", "no such value 'spott'; did you mean 'spot'?"),
        (("BlockDeviceMappings",), {}, "BlockDeviceMappings: {} is no list"),
        (("BlockDeviceMappings",), [{"Ebs": {"VolumSize": 1}}], "BlockDeviceMappings[0].Ebs.VolumSize: no such field"),
        (("BlockDeviceMappings",), [{"Ebs": {"VolumeSize": "1"}}], "VolumeSize: '1' is no integer"),
        (("BlockDeviceMappings",), [{"Ebs": {"VolumeSize": True}}], "VolumeSize: True is no integer"),
        (("IamInstanceProfile",), "worker", "IamInstanceProfile: 'worker' is no structure"),
    ],
)
def test_mistakes_in_awss_node_settings(where: tuple[str | int, ...], value: Any, says: str) -> None:
    pytest.importorskip("botocore", reason="botocore is not installed")
    definition = aws()
    assert aws_problems(definition) == []
    definition["available_node_types"]["generate"]["node_config"]["SubnetIds"] = ["subnet-1"]  # Ray's own
    change(definition["available_node_types"]["generate"]["node_config"], where, value)
    (found,) = aws_problems(definition)
    assert found.startswith("available_node_types.generate.node_config.")
    assert says in found
