"""Rendered files against what others publish: KubeRay's schemas, and the clouds' own models of a machine.

KubeRay's are the `*.schema.json` of its resources, or its custom resource definitions as `helm show crds` prints them.
"""

import json
from pathlib import Path
from typing import Any

from alpaca_ray.cluster.cloud_models import aws_problems, gcp_problems
from alpaca_ray.cluster.strict_schema import problems
from alpaca_ray.config import UserError
from alpaca_ray.yaml_lines import read_documents

KUBERAY_KINDS = {"raycluster": "RayCluster", "rayjob": "RayJob", "rayservice": "RayService"}
CLOUDS = {"aws": aws_problems, "gcp": gcp_problems}


def validate(file: Path, schemas: dict[str, Any]) -> list[str]:
    """`FILE: PATH: what is wrong`, a line each. `schemas`: by kind, from `read_schemas`.

    Raises UserError for a file that is neither a cluster file of AWS or Google's cloud nor a manifest of KubeRay.
    """
    found = []
    for document in read_documents(file):
        provider = document.get("provider")
        if document.get("kind") in KUBERAY_KINDS.values():
            found += _against_kuberay(document, schemas)
        elif isinstance(provider, dict) and provider.get("type") in CLOUDS:
            found += CLOUDS[provider["type"]](document)
        else:
            what = document.get("kind") or (provider or {}).get("type") or "no kind and no provider"
            raise UserError(f"nothing to check {what} against: {', '.join([*CLOUDS, *KUBERAY_KINDS.values()])}")
    return [f"{file}: {line}" for line in found]


def read_schemas(directory: Path) -> dict[str, Any]:
    """Schemas by kind. Raises UserError where the directory holds none."""
    found = {}
    for path in sorted(directory.glob("*.json")):
        for plural in (f"{name}s" for name in KUBERAY_KINDS):
            if path.name.split(".")[0] == plural:
                found[KUBERAY_KINDS[plural.removesuffix("s")]] = json.loads(path.read_text(encoding="utf-8"))
    for path in sorted([*directory.glob("*.yaml"), *directory.glob("*.yml")]):
        for document in read_documents(path):
            if document.get("kind") == "CustomResourceDefinition":
                found[document["spec"]["names"]["kind"]] = _version_1(document)
    if not found:
        raise UserError(
            f"{directory} holds no schema of KubeRay: `helm show crds kuberay/kuberay-operator > {directory}/crds.yaml`"
        )
    return found


def _version_1(definition: dict[str, Any]) -> Any:
    versions = {version["name"]: version["schema"]["openAPIV3Schema"] for version in definition["spec"]["versions"]}
    return versions["v1"]


def _against_kuberay(manifest: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    kind = manifest["kind"]
    if kind not in schemas:
        raise UserError(
            f"no schema for {kind}: give --schemas DIR with KubeRay's schemas "
            "(`helm show crds kuberay/kuberay-operator > DIR/crds.yaml`)"
        )
    return problems(manifest, schemas[kind])
