"""Recipes and serve_config.yaml against the groups of a cluster.yaml: is there a node for what they ask?"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from alpaca_ray.cluster.definition import GROUP, TYPES, Group
from alpaca_ray.config import Placement, RunConfig, ServeArgs, nearest
from alpaca_ray.yaml_lines import Location, mapping, mappings


@dataclass(frozen=True)
class Demand:
    """So many workers, each of them with its placement; `path`: the fields that say so."""

    path: Location
    placement: Placement
    num_workers: int
    counted_by: Location


def of_recipe(config: RunConfig) -> list[Demand]:
    """What the stages ask for at least: an elastic training starts with its fewest workers."""
    drivers = ((("pipeline", "drivers", stage), asked) for stage, asked in config.pipeline.drivers.items())
    return [
        Demand(
            ("generate", "placement"), config.generate.placement, config.generate.num_actors, ("generate", "num_actors")
        ),
        Demand(("train", "placement"), config.train.placement, config.train.workers[0], ("train", "num_workers")),
        # Base and trained model at once, an actor each.
        Demand(("evaluate", "placement"), config.evaluate.placement, 2, ("evaluate", "placement")),
        *(Demand(path, placement, 1, path) for path, placement in drivers),
    ]


def of_serve(values: Mapping[str, Any]) -> list[Demand]:
    """What our applications ask for, and deployments of any. What is not valid is left out: it is said elsewhere."""
    found = []
    for index, application in mappings(values.get("applications")):
        path: Location = ("applications", index)
        try:
            args = ServeArgs.model_validate(application.get("args"))
        except ValidationError:
            args = None
        if args is not None:
            counted = "num_replicas" if args.autoscaling is None else "autoscaling"
            demand = Demand((*path, "args", "placement"), args.placement, args.max_replicas, (*path, "args", counted))
            found.append(demand)
        found += [
            _of_deployment(each, (*path, "deployments", i)) for i, each in mappings(application.get("deployments"))
        ]
    return found


def unmet(demands: Sequence[Demand], groups: Sequence[Group], cluster: str) -> Iterator[tuple[Location, str]]:
    """Each demand that no group can meet, with the field that asks too much. `cluster`: the name of its file."""
    for demand in demands:
        chosen = [group for group in groups if _carries(group.labels, demand.placement.label_selector)]
        if chosen:
            yield from _too_large(demand, chosen, cluster)
        else:
            yield _no_group(demand, groups, cluster)


def unselected(demands: Sequence[Demand], groups: Sequence[Group]) -> Iterator[tuple[Location, str]]:
    """Labels of groups that no demand selects, but nearly: in cluster.yaml alone a typo of a value is not seen."""
    wanted = {demand.placement.label_selector[GROUP] for demand in demands if GROUP in demand.placement.label_selector}
    missing = sorted(wanted - {group.labels.get(GROUP, "") for group in groups})
    for group in groups:
        label = group.labels.get(GROUP)
        if label is not None and label not in wanted and (hint := nearest(label, missing)):
            yield (TYPES, group.name, "labels", GROUP), f"no recipe selects {label!r}{hint}"


def _of_deployment(deployment: Mapping[str, Any], path: Location) -> Demand:
    options = mapping(deployment, "ray_actor_options")
    names = [name for name in ("num_cpus", "num_gpus", "label_selector") if options.get(name) is not None]
    try:
        placement = Placement.model_validate({name: options[name] for name in names})
    except ValidationError:
        placement = Placement(num_cpus=0)
    return Demand((*path, "ray_actor_options"), placement, 1, (*path, "num_replicas"))


def _no_group(demand: Demand, groups: Sequence[Group], cluster: str) -> tuple[Location, str]:
    path = (*demand.path, "label_selector")
    for key, value in demand.placement.label_selector.items():
        values = sorted({group.labels[key] for group in groups if key in group.labels})
        if not values:
            keys = sorted({key for group in groups for key in group.labels})
            return (*path, key), f"no group of {cluster} has the label {key}{nearest(key, keys)}"
        if not any(_matches(there, value) for there in values):
            return (
                *path,
                key,
            ), f"no group of {cluster} is {value!r}{nearest(value, values)} (there are: {', '.join(values)})"
    return path, f"no group of {cluster} carries all these labels"


def _too_large(demand: Demand, groups: Sequence[Group], cluster: str) -> Iterator[tuple[Location, str]]:
    where = " or ".join(group.name for group in groups)
    for name, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        asked, most = getattr(demand.placement, name), max(group.resources.get(resource, 0) for group in groups)
        if asked > most:
            yield (
                (*demand.path, name),
                f"{asked:g} {resource} for one worker, and a node of {where} in {cluster} has {most:g}",
            )
            return
    room = sum(_room(demand.placement, group) for group in groups)
    if demand.num_workers > room:
        message = f"{demand.num_workers} workers, and {where} in {cluster} has room for {room:g}"
        yield demand.counted_by, f"{message}: fewer of them, or a higher max_workers there"


def _room(placement: Placement, group: Group) -> float:
    """How many workers all nodes of a group hold."""
    asked = {"CPU": placement.num_cpus, "GPU": placement.num_gpus}
    # Ray counts in ten-thousandths, so that ten workers of 0.1 fit where there is 1.
    fit = [
        group.resources.get(name, 0) * 10_000 // round(amount * 10_000) for name, amount in asked.items() if amount > 0
    ]
    return min(fit, default=math.inf) * group.max_nodes if group.max_nodes else 0


def _carries(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    return all(_matches(labels.get(key), value) for key, value in selector.items())


def _matches(label: str | None, wanted: str) -> bool:
    """Ray's selectors: `a`, `!a`, `in(a, b)`, `!in(a, b)`; a label that is not there is none of them."""
    given = re.fullmatch(r"(!?)(?:in)?\(?([^()]*)\)?", wanted)
    if given is None:
        return False
    return (label in re.split(r",\s*", given[2])) != bool(given[1])
