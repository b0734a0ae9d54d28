"""The shipped groups on the local twin: each stage starts nodes of its own group, and none stays.

`benchmarks/twin.py` does the same five times over, with whole stages of training and evaluation, and keeps the times.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from alpaca_ray import cli
from alpaca_ray.cluster import local, twin
from benchmarks.twin import ENVIRONMENT, GROUP, ROOT, Twin, ask, deploy, generate, room

UP = ["cluster", "up", "--local", "--file", str(ROOT / "cluster.yaml"), "--directory"]
DOWN = ["cluster", "down", "--local", "--directory"]
COMMAND_S = 120


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    directory = tmp_path_factory.mktemp("twin")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        assert cli.main([*UP, str(directory)]) == 0
    cluster = local.running(directory)
    assert cluster is not None
    yield Twin(cluster, tmp_path_factory.mktemp("runs"))
    twin.down(directory)


def test_generation_grows_to_two_cpu_nodes_and_back_and_starts_no_other(here: Twin) -> None:
    assert generate(here).started == {"generate": 2}
    packages = "session_latest/runtime_resources_*/working_dir_files/_ray_pkg_*/alpaca_ray"
    assert len(list(Path(here.cluster.temp_dir).glob(packages))) == 2  # one that nodes share is deleted under them


@pytest.mark.slow_fault
def test_the_shipped_recipes_trainer_finds_room_on_two_nodes_of_its_own(here: Twin) -> None:
    assert room(here).started == {"train": 2}


def test_rays_own_commands_reach_it_by_what_a_second_start_prints(
    here: Twin, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*UP, here.cluster.directory]) == 0
    said = capsys.readouterr().out
    assert "runs already" in said
    assert local.running(Path(here.cluster.directory)) == here.cluster

    exports = dict(line.removeprefix("export ").split("=", 1) for line in said.splitlines() if "export " in line)
    assert "Active:" in ray_says(exports, "ray", "status")
    assert here.cluster.dashboard in ray_says(exports, "ray", "job", "list")
    assert "applications: {}" in ray_says(exports, "serve", "status")


def ray_says(exports: dict[str, str], script: str, *options: str) -> str:
    command = [str(Path(sys.executable).parent / script), *options]
    done = subprocess.run(
        command, env=os.environ | exports, capture_output=True, text=True, timeout=COMMAND_S, check=True
    )
    return done.stdout


@pytest.mark.slow_fault
def test_a_request_wakes_a_node_and_none_outlives_a_head_that_was_killed(here: Twin) -> None:
    before = {node["node_id"] for node in here.nodes()}
    deploy(here)
    ask(here)
    assert [node["labels"][GROUP] for node in here.nodes() if node["node_id"] not in before] == ["serve"]
    assert here.alive() == {"serve": 1}
    processes = local.processes(here.cluster)
    os.kill(here.cluster.pid, signal.SIGKILL)

    assert cli.main([*DOWN, here.cluster.directory]) == 0
    assert not [process for process in processes if runs(process)]
    assert not Path(here.cluster.temp_dir).exists()
    assert cli.main([*DOWN, here.cluster.directory]) == 0  # once more, and there is nothing to do


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
