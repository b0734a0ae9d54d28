"""Which kind a file is, by what stands in it; all problems of all files, each alone and against the others."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from alpaca_ray.cluster import aws, definition
from alpaca_ray.config import RunConfig, nearest
from alpaca_ray.lint import recipes, together
from alpaca_ray.lint.secrets import secrets
from alpaca_ray.serve import lint as serve_config
from alpaca_ray.settings import recipe_names
from alpaca_ray.yaml_lines import Check, Fields, Problem, mapping, parse, read_text

Kind = Literal["cluster", "serve", "recipe"]
NAMES: dict[Kind, tuple[str, ...]] = {
    "cluster": ("cluster_name", "provider", "auth", "available_node_types", "head_node_type", "max_workers", "docker",
                "idle_timeout_minutes", "file_mounts", "setup_commands", "head_start_ray_commands"),
    "serve": ("applications", "http_options", "proxy_location", "logging_config", "grpc_options", "import_path"),
    "recipe": tuple(RunConfig.model_fields),
}  # fmt: skip


@dataclass(frozen=True)
class File:
    """A file, what is wrong with it alone, and what it is."""

    name: str
    problems: Sequence[Problem]
    kind: Kind | None = None
    fields: Fields | None = None


def default_files(directory: Path) -> list[Path]:
    """cluster.yaml and serve_config.yaml where they are, and the recipes that ship."""
    ours = [Path(str(resources.files("alpaca_ray") / "recipes" / f"{name}.yaml")) for name in recipe_names()]
    here = [Path(os.path.relpath(path, directory)) if path.is_relative_to(directory) else path for path in ours]
    return [path for path in (Path("cluster.yaml"), Path("serve_config.yaml")) if (directory / path).exists()] + here


def lint_files(paths: Sequence[Path], environ: Mapping[str, str]) -> list[str]:
    """A line for each problem: file, line, field, what is wrong. Raises UserError if a file cannot be read."""
    return lint_texts({str(path): read_text(path) for path in paths}, environ)


def lint_texts(texts: Mapping[str, str], environ: Mapping[str, str]) -> list[str]:
    """As `lint_files`, of files by name."""
    files = [_examine(name, text, environ) for name, text in texts.items()]
    found = {file.name: [*file.problems, *_against(file, files)] for file in files}
    return [f"{name}:{problem}" for name, problems in found.items() for problem in sorted(set(problems))]


def unchecked(paths: Sequence[Path]) -> str | None:
    """What could not be checked of these files here, and why; None: nothing."""
    kinds = [_examine(str(path), read_text(path), {}) for path in paths]
    on_aws = any(file.kind == "cluster" and mapping(_values(file), "provider").get("type") == "aws" for file in kinds)
    return aws.MISSING if on_aws and not aws.has_botocore() else None


def kind_of(values: Mapping[Any, Any]) -> Kind | None:
    """By the names at the top, misspelt ones too; None where no kind has more of them than the others."""
    names = [str(name) for name in values]
    scores = {kind: sum(2 * (n in known) or bool(nearest(n, known)) for n in names) for kind, known in NAMES.items()}
    best = max(scores.values())
    chosen = [kind for kind, score in scores.items() if score == best]
    return chosen[0] if best > 0 and len(chosen) == 1 else None


def _examine(name: str, text: str, environ: Mapping[str, str]) -> File:
    fields = parse(text)
    if isinstance(fields, Problem):
        return File(name, [fields])
    kind = kind_of(fields.values)
    if kind is None:
        return File(name, [Problem(1, "", "neither a cluster.yaml, nor a serve_config.yaml, nor a recipe")])
    found = Check(fields)
    for path, message, fragment in secrets(fields.values):
        found.say(path, message, fragment)
    alone = {
        "cluster": lambda: definition.check(fields),
        "serve": lambda: serve_config.check(fields, environ),
        "recipe": lambda: recipes.check(fields),
    }[kind]()
    return File(name, [*alone, *found.problems], kind, fields)


def _against(file: File, files: Sequence[File]) -> list[Problem]:
    """What is wrong with a file beside the others: what it asks for that no group of a cluster has."""
    if file.fields is None:
        return []
    found = Check(file.fields)
    if file.kind == "cluster":
        wanted = [demand for name in recipe_names() for demand in _shipped_demands(name)]
        for path, message in together.unselected(wanted, definition.groups(file.fields.values)):
            found.say(path, message)
    for cluster in files if file.kind in ("serve", "recipe") else ():
        if cluster.kind == "cluster":
            for path, message in together.unmet(_demands(file), definition.groups(_values(cluster)), cluster.name):
                found.say(path, message)
    return found.problems


def _demands(file: File) -> list[together.Demand]:
    if file.kind == "serve":
        return together.of_serve(_values(file))
    config = recipes.read(_values(file))
    return [] if config is None else together.of_recipe(config)


@cache
def _shipped_demands(name: str) -> list[together.Demand]:
    path = resources.files("alpaca_ray") / "recipes" / f"{name}.yaml"
    fields = parse(path.read_text(encoding="utf-8"))
    return _demands(File(name, [], "recipe", fields)) if isinstance(fields, Fields) else []


def _values(file: File) -> dict[Any, Any]:
    return {} if file.fields is None else file.fields.values
