"""cluster.yaml's other forms, made from it and never written by hand: `alpaca-ray cluster render --target gcp`.

The text depends on what the files say only, not on the order of their keys: rendering twice gives the same bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alpaca_ray.cluster.render_gcp import render_gcp
from alpaca_ray.cluster.render_kuberay import render_kuberay
from alpaca_ray.cluster.render_local import LocalScale, render_local
from alpaca_ray.cluster.render_options import check_definition, read_options
from alpaca_ray.config import RunConfig, UserError
from alpaca_ray.settings import load_config
from alpaca_ray.yaml_lines import read_mapping


@dataclass(frozen=True)
class Sources:
    """What the forms are made of: the parsed files, and the recipe that cluster.yaml names."""

    definition: dict[str, Any]
    serve_config: dict[str, Any]
    run: RunConfig
    scale: LocalScale = field(default_factory=LocalScale)


def read_sources(cluster_file: Path, serve_file: Path, scale: LocalScale | None = None) -> Sources:
    """Raises UserError for a file that is not there, no YAML, or not AWS's."""
    definition = read_definition(cluster_file)
    run = load_config(["--recipe", read_options(definition).recipe])
    return Sources(definition, read_mapping(serve_file), run, scale or LocalScale())


def read_definition(cluster_file: Path) -> dict[str, Any]:
    """A cluster.yaml. Raises UserError for a file that is not there, no YAML, or not AWS's."""
    definition = read_mapping(cluster_file)
    provider = (definition.get("provider") or {}).get("type")
    if provider != "aws":
        raise UserError(f"{cluster_file}: provider.type is {provider}: the other forms are made from one for aws")
    check_definition(definition, str(cluster_file))
    return definition


def _gcp(sources: Sources) -> dict[str, dict[str, Any]]:
    return {"cluster": render_gcp(sources.definition)}


def _kuberay(sources: Sources) -> dict[str, dict[str, Any]]:
    return render_kuberay(sources.definition, sources.run, sources.serve_config)


def _local(sources: Sources) -> dict[str, dict[str, Any]]:
    return {"autoscaling": render_local(sources.definition, sources.scale)}


TARGETS: dict[str, Callable[[Sources], dict[str, dict[str, Any]]]] = {"gcp": _gcp, "kuberay": _kuberay, "local": _local}


def render(sources: Sources, target: str) -> dict[str, str]:
    """File names and their text."""
    header = (
        f"# Made by `alpaca-ray cluster render --target {target}` from cluster.yaml and serve_config.yaml.\n"
        "# Change those and make it anew: what is changed here is lost.\n"
    )
    return {f"{name}.yaml": header + _dump(content) for name, content in TARGETS[target](sources).items()}


def stale_files(sources: Sources, target: str, directory: Path) -> list[str]:
    """Names of files in the directory that are missing, differ from what would be rendered, or are left over."""
    rendered = render(sources, target)
    there = {path.name: path.read_text(encoding="utf-8") for path in directory.glob("*.yaml")}
    return sorted(name for name in rendered.keys() | there.keys() if rendered.get(name) != there.get(name))


class _Dumper(yaml.SafeDumper):
    """No anchors, and texts of several lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _dump(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=True, width=120, allow_unicode=True)
