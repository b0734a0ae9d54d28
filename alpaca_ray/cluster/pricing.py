"""Dollars and hours of a run on a cluster, stage by stage: before it, and after it from its manifests. Pure, no Ray.

`alpaca-ray estimate alpaca_7b --cluster cluster.yaml`
"""

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from alpaca_ray.config import GenerateConfig, Placement, RunConfig, Strict, UserError, explain, nearest
from alpaca_ray.provider.budget import Budget, Charge, price_of
from alpaca_ray.yaml_lines import read_mapping

GROUP_LABEL = "alpaca-ray.io/group"
START_H = 10 / 60  # a node that boots, and a model that is loaded: paid for, and nothing is done
# Stanford Alpaca's data cost less than 500 USD at 20 USD per million tokens: no more than 481 tokens an instruction.
TOKENS_PER_INSTRUCTION = 500 / 20e-6 / 52_002
OUTPUT_TOKENS_PER_S = 100.0  # of one request, where the recipe names no rate limit
BATCH_H = 24.0  # what the Batch API promises
EVALUATED_TOKENS_PER_S = 400.0  # greedy, 7B in batches of 16 on an A100
HOURS_A_DAY = 24.0

Money = Annotated[float, Field(ge=0)]


class InstancePrice(Strict):
    """A row of prices.yaml."""

    on_demand_usd_per_hour: Money
    spot_usd_per_hour: Money | None = None
    gpu: str | None = None  # a name of train/gpus.yaml


class Prices(Strict):
    """A price table: where and when it was read."""

    region: str
    read: datetime.date
    source: str
    instances: dict[str, InstancePrice]

    def of(self, instance_type: str) -> InstancePrice:
        """Raises UserError that says how to add one."""
        if instance_type not in self.instances:
            raise UserError(
                f"no price of {instance_type}{nearest(instance_type, list(self.instances))} Give a file like "
                f"alpaca_ray/cluster/prices.yaml with it by --prices"
            )
        return self.instances[instance_type]


@dataclass(frozen=True)
class Group:
    """Nodes of one kind, as cluster.yaml has them."""

    name: str
    instance_type: str
    resources: Mapping[str, float]
    max_nodes: int
    is_spot: bool

    def nodes(self, count: int, placement: Placement, stage: str) -> int:
        """For so many workers. Raises UserError if they cannot be placed."""
        asked = {"CPU": placement.num_cpus, "GPU": placement.num_gpus}
        fits = [self.resources.get(name, 0) / amount for name, amount in asked.items() if amount > 0]
        each = math.floor(min(fits)) if fits else count
        needed = math.ceil(count / each) if each else math.inf
        if needed > self.max_nodes:
            raise UserError(
                f"{stage}: {count} workers of {asked} do not fit group {self.name!r}, at most {self.max_nodes} x "
                f"{self.instance_type} with {dict(self.resources)}: raise its max_workers, or ask for less"
            )
        return int(needed)


@dataclass(frozen=True)
class StageCost:
    """What one stage takes. None: not known."""

    stage: str
    group: Group
    num_nodes: int
    hours: float | None
    on_demand_usd: float | None
    spot_usd: float | None
    api_usd: float | None = 0.0

    @property
    def as_defined_usd(self) -> float | None:
        """In the market that the group is defined for, the API included."""
        nodes = self.spot_usd if self.group.is_spot else self.on_demand_usd
        return None if nodes is None or self.api_usd is None else nodes + self.api_usd


def load_prices(path: Path | None) -> Prices:
    """The table of the package, with the instances of a file before its own. Raises UserError for a wrong file."""
    shipped = Prices.model_validate(
        yaml.safe_load((resources.files("alpaca_ray") / "cluster" / "prices.yaml").read_text(encoding="utf-8"))
    )
    if path is None:
        return shipped
    try:
        given = Prices.model_validate(read_mapping(path))
    except ValidationError as error:
        raise UserError(explain(error, str(path), Prices)) from None
    return given.model_copy(update={"instances": shipped.instances | given.instances})


def load_groups(path: Path) -> tuple[dict[str, Group], float]:
    """The groups of a cluster.yaml by their label, and the hours that an idle node stays. Raises UserError."""
    definition = read_mapping(path)
    kinds = definition.get("available_node_types")
    if not isinstance(kinds, dict):
        raise UserError(f"{path}: available_node_types is missing: is this a Ray cluster definition?")
    groups = {}
    for name, kind in kinds.items():
        try:
            node = kind["node_config"]
            groups[kind.get("labels", {}).get(GROUP_LABEL, name)] = Group(
                name=name,
                instance_type=node["InstanceType"],
                resources=kind.get("resources", {}),
                max_nodes=1 if name == definition.get("head_node_type") else kind["max_workers"],
                is_spot=node.get("InstanceMarketOptions", {}).get("MarketType") == "spot",
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: available_node_types.{name}: {error} is missing or of the wrong type; "
                "`alpaca-ray lint` says more"
            ) from None
    return groups, definition.get("idle_timeout_minutes", 5) / 60


def group_of(groups: Mapping[str, Group], placement: Placement, stage: str) -> Group | None:
    """The group that a stage selects by its label; None if it selects none. Raises UserError for an unknown one."""
    name = placement.label_selector.get(GROUP_LABEL)
    if name is None:
        return None
    if name not in groups:
        raise UserError(
            f"{stage}.placement selects group {name!r}, which the cluster does not have{nearest(name, list(groups))}"
        )
    return groups[name]


def estimate(
    config: RunConfig, groups: Mapping[str, Group], idle_h: float, prices: Prices, train_h: float | None
) -> list[StageCost]:
    """Generate, train, evaluate, a day of serving by one node, and the head beside the first three."""
    generate_h, api_usd = generation(config.generate)
    evaluate = config.evaluate
    evaluate_h = (evaluate.num_instructions or 60) * evaluate.max_new_tokens / EVALUATED_TOKENS_PER_S / 3600
    around_h = START_H + idle_h
    work = {
        "generate": (config.generate.placement, config.generate.num_actors, generate_h, api_usd),
        "train": (config.train.placement, config.train.workers[1], train_h, 0.0),
        "evaluate": (evaluate.placement, 2, evaluate_h, 0.0),  # an actor for each model
    }
    costs = []
    for stage, (placement, count, hours, usd) in work.items():
        if group := group_of(groups, placement, stage):
            nodes = group.nodes(count, placement, stage)
            costs.append(cost(stage, group, nodes, None if hours is None else hours + around_h, prices, usd))
    if not costs:
        raise UserError(f"recipe {config.name} selects no group of a cluster: it runs on this machine, for nothing")
    return [*costs, *_head(costs, groups, prices), *_serving(groups, prices)]


def generation(config: GenerateConfig) -> tuple[float, float | None]:
    """Hours, and dollars of the API (None: no price is known); an upper bound, at the dearer of the two prices."""
    tokens = math.ceil(config.num_instructions * TOKENS_PER_INSTRUCTION)
    requests = tokens / config.teacher.max_tokens
    concurrency = config.num_actors * config.concurrent_requests_per_actor
    limits = config.limits
    minutes = [
        tokens / limits.tokens_per_minute if limits.tokens_per_minute else 0.0,
        requests / limits.requests_per_minute if limits.requests_per_minute else 0.0,
        tokens / OUTPUT_TOKENS_PER_S / concurrency / 60,
    ]
    price = price_of(config.teacher.model, config.teacher.price)
    budget = Budget(None, None, price, batch=config.mode == "batch")
    usd = None if price is None else max(budget.usd(Charge(tokens, 0)), budget.usd(Charge(0, tokens)))
    return BATCH_H if config.mode == "batch" else max(minutes) / 60, usd


def cost_of(
    manifests: Sequence[Mapping[str, Any]], config: RunConfig, groups: Mapping[str, Group], prices: Prices
) -> list[StageCost]:
    """What finished stages did cost: the wall time of each one's last try, on the nodes that `config` asks for.

    `config` is the one in the run's config.yaml: manifests hold no placement. The API's dollars are those of all tries.
    """
    counts = {"generate": config.generate.num_actors, "train": config.train.workers[1], "evaluate": 2}
    costs = []
    for manifest in manifests:
        stage = manifest["stage"]
        placement: Placement = getattr(config, stage).placement
        if group := group_of(groups, placement, stage):
            nodes = group.nodes(counts[stage], placement, stage)
            usd = manifest["counts"].get("usd", 0.0)
            costs.append(cost(stage, group, nodes, manifest["wall_time_s"] / 3600, prices, usd))
    return costs + _head(costs, groups, prices) if costs else []


def cost(  # noqa: PLR0913, PLR0917 - a row of the table
    stage: str, group: Group, num_nodes: int, hours: float | None, prices: Prices, api_usd: float | None
) -> StageCost:
    """Of so many nodes for so long, in both markets."""
    price, node_h = prices.of(group.instance_type), None if hours is None else hours * num_nodes
    spot = price.spot_usd_per_hour
    return StageCost(
        stage, group, num_nodes, hours,
        on_demand_usd=None if node_h is None else node_h * price.on_demand_usd_per_hour,
        spot_usd=None if node_h is None or spot is None else node_h * spot,
        api_usd=api_usd,
    )  # fmt: skip


def _head(costs: Sequence[StageCost], groups: Mapping[str, Group], prices: Prices) -> list[StageCost]:
    if "head" not in groups:
        return []
    hours = [item.hours for item in costs if item.hours is not None]
    return [cost("head", groups["head"], 1, sum(hours) if len(hours) == len(costs) else None, prices, 0.0)]


def _serving(groups: Mapping[str, Group], prices: Prices) -> list[StageCost]:
    if "serve" not in groups:
        return []
    return [cost("serve, a day", groups["serve"], 1, HOURS_A_DAY, prices, 0.0)]


def render(costs: Sequence[StageCost], prices: Prices, mode: str = "online") -> str:
    """The table of an estimate, its sum and what it takes for granted."""
    return "\n".join(
        [
            *_table(costs), "", "assumptions", _of_prices(prices),
            f"  {START_H * 60:.0f} minutes for nodes to start, and the idle time-out, in each stage's hours",
            f"  generation: {TOKENS_PER_INSTRUCTION:.0f} tokens an instruction (Alpaca's, at most), all at the "
            f"dearer price, {OUTPUT_TOKENS_PER_S:.0f} tokens/s a request or the recipe's limits;",
            "    `jobs/generate.py --dry-run` measures it" if mode == "online" else "    a day for the Batch API",
            f"  evaluation: {EVALUATED_TOKENS_PER_S:.0f} tokens/s a model; serving: one node; "
            "no disks, traffic, or storage; spot without what is done twice",
        ]
    )  # fmt: skip


def render_spent(costs: Sequence[StageCost], prices: Prices) -> str:
    """The table of what a run did cost, and what is not in it."""
    return "\n".join(
        [
            *_table(costs), "", _of_prices(prices),
            "  hours: the last try of each stage that is done, on as many nodes as its config asks for at most;",
            "  not in it: earlier tries, nodes that start or idle, disks, traffic and storage. The API: all tries",
        ]
    )  # fmt: skip


def _table(costs: Sequence[StageCost]) -> list[str]:
    lines = [f"{'stage':<14}{'nodes':<20}{'hours':>8}{'on demand':>13}{'spot':>12}{'API':>11}"]
    for item in costs:
        nodes = f"{item.num_nodes} x {item.group.instance_type}"
        dollars = _usd(item.on_demand_usd, 12), _usd(item.spot_usd, 11), _usd(item.api_usd, 11)
        marks = " *" if item.group.is_spot else "* "
        hours = "unknown" if item.hours is None else f"{item.hours:.2f}"
        lines.append(f"{item.stage:<14}{nodes:<20}{hours:>8}{dollars[0]}{marks[0]}{dollars[1]}{marks[1]}{dollars[2]}")
    run = [item.as_defined_usd for item in costs if item.stage != "serve, a day"]
    known = [usd for usd in run if usd is not None]
    total = f"${sum(known):,.2f}" if len(known) == len(run) else f"more than ${sum(known):,.2f}"
    return [*lines, "", f"the run, in the markets marked *, with the API: {total}"]


def _of_prices(prices: Prices) -> str:
    return f"  prices of {prices.region} as read on {prices.read}, to be checked: {prices.source}"


def _usd(value: float | None, width: int) -> str:
    return f"{'unknown' if value is None else f'${value:,.2f}':>{width}}"
