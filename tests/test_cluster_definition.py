"""cluster.yaml is valid to Ray, and every recipe finds in it the nodes that its stages ask for."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from alpaca_ray.config import Placement
from alpaca_ray.settings import load_config, recipe_names

ROOT = Path(__file__).parents[1]
GROUP = "alpaca-ray.io/group"


@pytest.fixture
def definition() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return parsed


def groups(definition: dict[str, Any]) -> dict[str, Any]:
    return {kind["labels"][GROUP]: kind for kind in definition["available_node_types"].values()}


def test_ray_accepts_the_definition(definition: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(definition)))


def test_ray_refuses_an_unknown_key(definition: dict[str, Any]) -> None:
    definition["idle_timeout_minute"] = 5
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(prepare_config(definition))


def test_every_group_but_the_head_starts_at_zero(definition: dict[str, Any]) -> None:
    assert set(groups(definition)) == {"head", "generate", "train", "serve"}
    assert groups(definition)["head"]["resources"] == {"CPU": 0}
    for name, kind in groups(definition).items():
        if name != "head":
            assert kind["min_workers"] == 0
            assert kind["max_workers"] > 0


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_stage_of_every_recipe_fits_its_group(definition: dict[str, Any], recipe: str) -> None:
    config = load_config(["--recipe", recipe])
    for stage in (config.generate, config.train, config.evaluate):
        placement: Placement = stage.placement
        if not placement.label_selector:
            continue
        group = groups(definition)[placement.label_selector[GROUP]]
        assert placement.num_cpus <= group["resources"]["CPU"]
        assert placement.num_gpus <= group["resources"].get("GPU", 0)
    if config.train.placement.label_selector:
        gpus = groups(definition)["train"]["resources"]["GPU"] * groups(definition)["train"]["max_workers"]
        assert config.train.workers[1] * config.train.placement.num_gpus <= gpus


def test_the_definition_opens_nothing_and_holds_no_secret(definition: dict[str, Any]) -> None:
    head = " ".join(definition["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    for command in (*definition["head_start_ray_commands"], *definition["worker_start_ray_commands"]):
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token" in command
            assert "secretsmanager get-secret-value" in command


def test_nodes_install_nothing_when_they_start(definition: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(definition))  # with Ray's defaults, which install a nightly Ray
    setup = [command for name, commands in prepared.items() if name.endswith("setup_commands") for command in commands]
    assert not setup
    assert not prepared["initialization_commands"]
    _, _, tag = definition["docker"]["image"].rpartition(":")
    assert tag not in ("", "latest")


def test_labels_start_nodes(definition: dict[str, Any]) -> None:
    """Only the autoscaler's second version looks at label selectors, and it is off by default."""
    (start,) = [command for command in definition["head_start_ray_commands"] if "ray start" in command]
    assert "RAY_enable_autoscaler_v2=1" in start.partition("ray start")[0]


def test_the_heads_state_outlives_its_container(definition: dict[str, Any]) -> None:
    """On a named volume, which takes its owner from the directory in the image."""
    start, keeper = (c for c in definition["head_start_ray_commands"] if "ray stop" not in c)
    (path,) = re.findall(r"RAY_gcs_storage=rocksdb RAY_gcs_storage_path=(\S+)", start.partition("ray start")[0])
    assert definition["docker"]["head_run_options"] == [f"--volume=alpaca-ray-gcs:{path}"]
    assert path in (ROOT / "deploy" / "Dockerfile").read_text().partition("RUN mkdir")[2].partition("\n")[0]
    assert re.findall(r"--port[ =](\d+)", keeper) == re.findall(r"--port=(\d+)", start)


def test_spot_groups_are_labelled(definition: dict[str, Any]) -> None:
    for name, kind in groups(definition).items():
        is_spot = "InstanceMarketOptions" in kind["node_config"]
        assert (kind["labels"].get("alpaca-ray.io/market") == "spot") == is_spot, name
    assert "InstanceMarketOptions" not in groups(definition)["head"]["node_config"]
