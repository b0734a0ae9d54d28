"""Dollars and hours: from a table written down here, by hand."""

from pathlib import Path

import pytest
import yaml

from alpaca_ray import cli
from alpaca_ray.cluster import pricing
from alpaca_ray.cluster.pricing import START_H, Group, InstancePrice, Prices, StageCost
from alpaca_ray.config import Placement, RunConfig, UserError
from alpaca_ray.settings import load_config, recipe_names
from alpaca_ray.train.estimate import gpus

ROOT = Path(__file__).parents[2]
PRICES = Prices.model_validate(
    {
        "region": "here", "read": "2026-01-01", "source": "made up",
        "instances": {
            "m6i.2xlarge": {"on_demand_usd_per_hour": 1.0, "spot_usd_per_hour": 0.25},
            "p4de.24xlarge": {"on_demand_usd_per_hour": 100.0, "spot_usd_per_hour": None},
            "g5.2xlarge": {"on_demand_usd_per_hour": 10.0, "spot_usd_per_hour": 4.0},
        },
    }
)  # fmt: skip


def shipped() -> tuple[dict[str, Group], float]:
    return pricing.load_groups(ROOT / "cluster.yaml")


def recipe(*overrides: str) -> RunConfig:
    return load_config(["--recipe", "alpaca_7b", *overrides])


def by_stage(costs: list[StageCost]) -> dict[str, StageCost]:
    return {item.stage: item for item in costs}


def test_a_stage_costs_its_nodes_for_its_hours_in_both_markets() -> None:
    groups, idle_h = shipped()
    costs = by_stage(pricing.estimate(recipe(), groups, idle_h, PRICES, train_h=2.0))
    train_h = 2.0 + START_H + idle_h
    assert costs["train"].num_nodes == 1  # 8 workers of a GPU each, 8 GPUs a node
    assert costs["train"].on_demand_usd == pytest.approx(100.0 * train_h)
    assert costs["train"].spot_usd is None  # no spot price is known
    assert costs["train"].as_defined_usd == costs["train"].on_demand_usd
    generate = costs["generate"]
    assert generate.hours is not None
    assert generate.api_usd is not None
    assert generate.as_defined_usd == pytest.approx(0.25 * generate.hours + generate.api_usd)  # a spot group
    assert costs["serve, a day"].on_demand_usd == 240.0
    assert costs["head"].hours == pytest.approx(sum(costs[s].hours or 0 for s in ("generate", "train", "evaluate")))


def test_more_workers_take_more_nodes_until_the_group_has_no_more() -> None:
    group = Group("train", "p4de.24xlarge", {"CPU": 96, "GPU": 8}, max_nodes=2, is_spot=False)
    one = Placement(num_cpus=8, num_gpus=1)
    assert [group.nodes(count, one, "train") for count in (1, 8, 9, 16)] == [1, 1, 2, 2]
    assert group.nodes(8, Placement(num_cpus=24, num_gpus=1), "train") == 2  # CPUs are what is short
    with pytest.raises(UserError, match=r"17 workers .* at most 2 x p4de"):
        group.nodes(17, one, "train")
    with pytest.raises(UserError, match="do not fit"):
        group.nodes(1, Placement(num_cpus=1, num_gpus=16), "train")


def test_unknown_training_time_is_unknown_money_never_zero() -> None:
    groups, idle_h = shipped()
    costs = by_stage(pricing.estimate(recipe(), groups, idle_h, PRICES, train_h=None))
    assert costs["train"].on_demand_usd is None
    assert costs["head"].hours is None
    assert "more than $" in pricing.render(list(costs.values()), PRICES)


def test_generation_takes_as_long_as_its_tightest_limit() -> None:
    free, _ = pricing.generation(recipe().generate)
    limited, usd = pricing.generation(recipe("--generate.limits.tokens-per-minute", "60000").generate)
    tokens = 52_002 * pricing.TOKENS_PER_INSTRUCTION
    assert tokens == pytest.approx(25e6)  # 500 USD at 20 USD a million
    assert limited == pytest.approx(tokens / 60_000 / 60, rel=1e-6)
    assert free < limited
    assert usd == pytest.approx(50.0)  # 2 USD a million, the dearer of gpt-3.5-turbo-instruct's two
    by_requests, _ = pricing.generation(recipe("--generate.limits.requests-per-minute", "10").generate)
    assert by_requests == pytest.approx(tokens / 3072 / 10 / 60, rel=1e-6)


def test_the_batch_api_takes_a_day_for_half_the_price() -> None:
    hours, usd = pricing.generation(recipe("--generate.mode", "batch").generate)
    assert hours == 24.0
    assert usd == pytest.approx(25.0)


def test_a_model_without_a_price_is_not_free() -> None:
    _, usd = pricing.generation(recipe("--generate.teacher.model", "somebodys-own").generate)
    assert usd is None


def test_what_a_run_did_cost_comes_from_its_manifests() -> None:
    groups, _ = shipped()
    manifests = [
        {"stage": "generate", "wall_time_s": 7200.0, "counts": {"usd": 12.5}},
        {"stage": "train", "wall_time_s": 1800.0, "counts": {"steps": 3}},
    ]
    costs = by_stage(pricing.cost_of(manifests, recipe("--train.num-workers", "16"), groups, PRICES))
    assert costs["generate"].as_defined_usd == pytest.approx(2 * 0.25 + 12.5)
    assert costs["train"].on_demand_usd == pytest.approx(0.5 * 2 * 100.0)
    assert costs["head"].on_demand_usd == pytest.approx(2.5)
    assert set(costs) == {"generate", "train", "head"}


def test_the_shipped_table_has_every_group_and_its_gpus_are_known() -> None:
    prices, (groups, _) = pricing.load_prices(None), shipped()
    for group in groups.values():
        price = prices.of(group.instance_type)
        assert price.gpu is None or price.gpu in gpus()
        assert (price.gpu is None) == ("GPU" not in group.resources)
        assert price.spot_usd_per_hour is not None
        assert price.spot_usd_per_hour < price.on_demand_usd_per_hour


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "tiny_cpu"])
def test_every_recipe_for_a_cluster_has_an_estimate(name: str) -> None:
    groups, idle_h = shipped()
    costs = pricing.estimate(load_config(["--recipe", name]), groups, idle_h, pricing.load_prices(None), 1.0)
    assert [item.stage for item in costs] == ["generate", "train", "evaluate", "head", "serve, a day"]
    assert all(item.as_defined_usd is not None for item in costs)


def test_a_given_table_goes_before_the_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    table = {"region": "eu", "read": "2026-02-03", "source": "a contract"}
    path.write_text(yaml.safe_dump({**table, "instances": {"m6i.2xlarge": {"on_demand_usd_per_hour": 7.0}}}))
    prices = pricing.load_prices(path)
    assert prices.of("m6i.2xlarge") == InstancePrice(on_demand_usd_per_hour=7.0)
    assert prices.of("g5.2xlarge") == pricing.load_prices(None).of("g5.2xlarge")
    assert prices.source == "a contract"
    path.write_text(yaml.safe_dump({**table, "instances": {"m6i.2xlarge": {"on_demand_usd": 7.0}}}))
    with pytest.raises(UserError, match=r"prices.yaml: instances.m6i.2xlarge.on_demand_usd"):
        pricing.load_prices(path)


def test_wrong_files_and_names_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        pricing.load_groups(tmp_path / "none.yaml")
    definition = tmp_path / "cluster.yaml"
    definition.write_text("available_node_types: {train: {max_workers: 2}}")
    with pytest.raises(UserError, match=r"available_node_types.train: 'node_config'"):
        pricing.load_groups(definition)
    with pytest.raises(UserError, match=r"p4d.24xlarge|p4de.24xlarge"):
        pricing.load_prices(None).of("p4dx.24xlarge")
    with pytest.raises(UserError, match="did you mean 'train'"):
        pricing.group_of(shipped()[0], Placement(label_selector={"alpaca-ray.io/group": "trian"}), "train")


def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "alpaca_7b", "--cluster", str(ROOT / "cluster.yaml")]) == 0
    said = capsys.readouterr().out
    for word in ("a100-80gb", "p4de.24xlarge", "on demand", "us-west-2", "2026-11-23", "serve, a day"):
        assert word in said
