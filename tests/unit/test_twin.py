"""How large the local twin may grow, and what its commands refuse."""

from pathlib import Path
from typing import Any

import pytest

from alpaca_ray import cli
from alpaca_ray.cluster.render import read_definition
from alpaca_ray.cluster.render_local import LocalScale
from alpaca_ray.cluster.twin import HEAD_MB, NODE_MB, most_nodes, room
from alpaca_ray.config import UserError

ROOT = Path(__file__).parents[2]
EACH_MB = NODE_MB + LocalScale().object_store_mb


@pytest.fixture(scope="module")
def definition() -> dict[str, Any]:
    return read_definition(ROOT / "cluster.yaml")


def test_a_large_machine_has_room_for_all_groups(definition: dict[str, Any]) -> None:
    assert room(definition, LocalScale(), 10**6) == most_nodes(definition) == 8 + 2 + 4


def test_a_small_machine_has_room_for_as_many_nodes_as_fit(definition: dict[str, Any]) -> None:
    assert room(definition, LocalScale(), HEAD_MB + 3 * EACH_MB + 1) == 3


def test_a_machine_without_room_for_a_node_is_told_so(definition: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"needs {HEAD_MB + EACH_MB} MB of memory .* {HEAD_MB} MB are available"):
        room(definition, LocalScale(), HEAD_MB)


def test_the_limit_of_the_whole_cluster_holds(definition: dict[str, Any]) -> None:
    assert most_nodes(definition | {"max_workers": 5}) == 5


@pytest.mark.parametrize(("verb", "remedy"), [("up", "ray up cluster.yaml"), ("down", "ray down cluster.yaml")])
def test_the_real_cluster_is_rays_business(verb: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cluster", verb]) == 2
    assert remedy in capsys.readouterr().err


def test_down_without_a_twin_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cluster", "down", "--local", "--directory", str(tmp_path)]) == 0
    assert "no twin" in capsys.readouterr().out
