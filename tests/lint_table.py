"""How many seeded mistakes `alpaca-ray lint` finds, and how many Ray's own checks object to.

python -m tests.lint_table
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from alpaca_ray.cluster import aws
from alpaca_ray.lint.files import lint_texts
from tests.lint_seeds import SEEDS, SHIPPED, Seed


@dataclass(frozen=True)
class Row:
    """Counts over the mistakes in one file."""

    file: str
    seeds: int
    ours: int
    ray: int


def needs_botocore(seed: Seed) -> bool:
    return ".node_config." in seed.field or seed.field == "provider.region"


@cache
def ours(seed: Seed) -> list[str]:
    """What is said of the mistake's file, of the cluster beside it, and of the file that it contradicts."""
    beside = {name: SHIPPED[name] for name in ("cluster.yaml", seed.found_in) if name}
    return lint_texts(beside | {seed.file: seed.text}, {})


def ours_finds(seed: Seed) -> bool:
    """File, line, field and what has to be said are all right."""
    where = f"{seed.found_in or seed.file}:{seed.line}: {seed.field}: "
    return any(line.startswith(where) and seed.says in line for line in ours(seed))


def ray_objects(seed: Seed) -> bool:
    """Ray refuses the file, for any reason, on any line. Ray has no check for recipes."""
    return refused_by_ray(seed.file, seed.text)


def refused_by_ray(file: str, text: str) -> bool:
    """As `ray_objects`, of any text in the place of a file that ships."""
    validate = _RAYS.get(file)
    if validate is None:
        return False
    try:
        validate(yaml.safe_load(text))
    except Exception:  # whatever it raises, it has objected
        return True
    return False


def counts() -> list[Row]:
    """One row a file."""
    return [_row(file) for file in SHIPPED]


def render(rows: list[Row]) -> str:
    """The table of docs/operations.md."""
    lines = ["| file | mistakes | `alpaca-ray lint` | Ray's own check |", "|---|---|---|---|"]
    total = Row("all", *(sum(getattr(row, name) for row in rows) for name in ("seeds", "ours", "ray")))
    return "\n".join([*lines, *(f"| {row.file} | {row.seeds} | {row.ours} | {row.ray} |" for row in [*rows, total])])


def _row(file: str) -> Row:
    seeds = [seed for seed in SEEDS if seed.file == file]
    return Row(file, len(seeds), sum(map(ours_finds, seeds)), sum(map(ray_objects, seeds)))


def _validate_cluster(values: dict[str, Any]) -> None:
    validate_config(prepare_config(values))


_RAYS: dict[str, Callable[[dict[str, Any]], object]] = {
    "cluster.yaml": _validate_cluster,
    "serve_config.yaml": ServeDeploySchema.model_validate,
}


if __name__ == "__main__":
    logging.disable()
    if not aws.has_botocore():
        print(aws.MISSING)
    print(render(counts()))
