"""What the renderers refuse, and what they make of definitions other than the shipped one."""

import base64
import copy
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from alpaca_ray.cluster import gcp_secret
from alpaca_ray.cluster.machine_types import MACHINES
from alpaca_ray.cluster.render import read_sources
from alpaca_ray.cluster.render_gcp import render_gcp
from alpaca_ray.cluster.render_kuberay import render_kuberay
from alpaca_ray.cluster.render_local import HEAD_TYPE, LocalScale, render_local
from alpaca_ray.cluster.render_options import read_options
from alpaca_ray.cluster.start_commands import Variable, for_gcp, variables
from alpaca_ray.config import RunConfig, UserError
from alpaca_ray.settings import load_config

ROOT = Path(__file__).parents[2]
Content = dict[str, Any]


@pytest.fixture
def definition() -> Content:
    content: Content = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return content


@pytest.fixture(scope="module")
def run() -> RunConfig:
    return load_config(["--recipe", "alpaca_7b"])


def node_config(definition: Content, group: str) -> Content:
    config: Content = definition["available_node_types"][group]["node_config"]
    return config


def kuberay(definition: Content, run: RunConfig) -> Content:
    serve: Content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    return render_kuberay(definition, run, serve)


def test_the_table_gives_no_fewer_cpus() -> None:
    for name, machine in MACHINES.items():
        assert machine.gcp.num_cpus >= machine.num_cpus, name


def test_rendering_leaves_the_definition_as_it_is(definition: Content, run: RunConfig) -> None:
    before = copy.deepcopy(definition)
    render_gcp(definition)
    kuberay(definition, run)
    render_local(definition, LocalScale())
    assert definition == before


def test_spot_follows_the_definition(definition: Content) -> None:
    node_config(definition, "train")["InstanceMarketOptions"] = {"MarketType": "spot"}
    del node_config(definition, "generate")["InstanceMarketOptions"]
    types = render_gcp(definition)["available_node_types"]
    assert types["train"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert types["train"]["node_config"]["scheduling"]["instanceTerminationAction"] == "DELETE"
    assert "scheduling" not in types["generate"]["node_config"]


def test_gpus_that_do_not_come_with_the_machine_are_named(definition: Content) -> None:
    node_config(definition, "serve")["InstanceType"] = "g4dn.2xlarge"
    config = render_gcp(definition)["available_node_types"]["serve"]["node_config"]
    assert config["guestAccelerators"] == [{"acceleratorType": "nvidia-tesla-t4", "acceleratorCount": 1}]
    assert config["scheduling"]["onHostMaintenance"] == "TERMINATE"


def test_an_unknown_instance_type_says_how_to_add_it(definition: Content, run: RunConfig) -> None:
    node_config(definition, "train")["InstanceType"] = "p9.96xlarge"
    with pytest.raises(UserError, match=r"metadata\.render\.gcp\.machine_types: {p9\.96xlarge:"):
        render_gcp(definition)
    with pytest.raises(UserError, match=r"metadata\.render\.kuberay\.pods: {p9\.96xlarge:"):
        kuberay(definition, run)
    options = definition["metadata"]["render"]
    options["gcp"]["machine_types"] = {"p9.96xlarge": {"machine_type": "a9-mega-8g", "num_cpus": 96}}
    options["kuberay"]["pods"] = {"p9.96xlarge": {"num_cpus": 90.5, "memory_gib": 1000}}
    assert render_gcp(definition)["available_node_types"]["train"]["node_config"]["machineType"] == "a9-mega-8g"
    job = kuberay(definition, run)["rayjob-train"]["spec"]["rayClusterSpec"]
    asked = job["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert asked == {"cpu": "90.5", "memory": "1000Gi", "nvidia.com/gpu": "8"}


def test_a_machine_that_is_too_small_is_refused(definition: Content) -> None:
    definition["available_node_types"]["generate"]["resources"]["CPU"] = 9
    with pytest.raises(UserError, match="generate: n2-standard-8 has 8 CPUs, resources ask for 9"):
        render_gcp(definition)


def test_a_misspelt_option_is_named(definition: Content) -> None:
    definition["metadata"]["render"]["gcp"]["projectid"] = "x"
    with pytest.raises(UserError, match=r"gcp\.projectid: no such field; did you mean 'gcp\.project_id'"):
        read_options(definition)
    del definition["metadata"]
    with pytest.raises(UserError, match=r"metadata\.render is missing"):
        read_options(definition)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (("docker",), "docker: Field required"),
        (("available_node_types", "train", "node_config", "InstanceType"), "train.node_config.InstanceType: Field req"),
        (("available_node_types", "head"), "head_node_type 'head' is none of generate, train, serve"),
        (("worker_start_ray_commands",), "worker_start_ray_commands: Field required"),
    ],
)
def test_what_the_renderers_need_is_named(
    definition: Content, path: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    inside = definition
    for step in path[:-1]:
        inside = inside[step]
    del inside[path[-1]]
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
    with pytest.raises(UserError, match=re.escape(says)):
        read_sources(tmp_path / "cluster.yaml", ROOT / "serve_config.yaml")


def test_a_group_without_a_maximum_has_the_clusters(definition: Content, run: RunConfig) -> None:
    del definition["available_node_types"]["train"]["max_workers"]
    job = kuberay(definition, run)["rayjob-train"]["spec"]["rayClusterSpec"]
    assert job["workerGroupSpecs"][0]["maxReplicas"] == definition["max_workers"]
    assert render_local(definition, LocalScale())["available_node_types"]["train"]["max_workers"] == 20


def test_a_stage_without_a_group_is_refused(definition: Content, run: RunConfig) -> None:
    definition["available_node_types"]["train"]["labels"] = {"alpaca-ray.io/group": "tuning"}
    with pytest.raises(UserError, match="recipe alpaca_7b: train selects"):
        kuberay(definition, run)


def test_the_head_may_keep_its_state_in_redis(definition: Content, run: RunConfig) -> None:
    options = definition["metadata"]["render"]["kuberay"]
    options |= {"gcs_backend": "redis", "redis_address": "redis:6379", "redis_secret": "redis"}
    assert kuberay(definition, run)["raycluster"]["spec"]["gcsFaultToleranceOptions"] == {
        "backend": "redis",
        "redisAddress": "redis:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
    }
    del options["redis_address"]
    with pytest.raises(UserError, match="redis_address"):
        kuberay(definition, run)


def test_without_a_token_in_the_definition_there_is_none_in_kuberay(definition: Content, run: RunConfig) -> None:
    commands = definition["head_start_ray_commands"]
    definition["head_start_ray_commands"] = [command.replace("RAY_AUTH_MODE=token", "") for command in commands]
    assert kuberay(definition, run)["raycluster"]["spec"]["authOptions"] == {"mode": "disabled"}


def test_the_twin_is_as_large_as_asked(definition: Content) -> None:
    twin = render_local(definition, LocalScale(num_cpus=4, max_workers=3, gcs_port=1234, idle_timeout_s=30))
    assert twin["head_node_type"] == HEAD_TYPE
    assert {kind["resources"]["CPU"] for kind in twin["available_node_types"].values()} == {0, 4}
    assert twin["max_workers"] == 3
    assert twin["provider"]["gcs_address"] == "127.0.0.1:1234"
    assert twin["idle_timeout_minutes"] == 0.5
    # Ray would fill in a nightly build, mounts and ssh where these are missing.
    assert not any(twin[key] for key in ("setup_commands", "head_setup_commands", "file_mounts", "auth", "docker"))


START = (
    'export PATH=/x/bin:$PATH MODE=a KEY="$(aws secretsmanager get-secret-value --secret-id team/key '
    '--query SecretString --output text)"; nohup watch --cloud aws & ray start --head'
)


def test_the_environment_of_a_start_command() -> None:
    assert variables(["ray stop", START]) == [Variable("MODE", "a", None), Variable("KEY", None, "team-key")]
    (stop, start) = for_gcp(["ray stop", START])
    assert stop == "ray stop"
    assert 'KEY="$(/home/ubuntu/venv/bin/python -m alpaca_ray.cluster.gcp_secret team-key)"; nohup' in start
    assert "--cloud gcp" in start
    assert "aws" not in start


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("ray stop", "0 of the start commands"),
        ("MODE=a ray start", "has to be `export"),
        ('export KEY="$(vault read key)"; ray start', "KEY is computed by"),
    ],
)
def test_a_start_command_that_has_no_other_form(command: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        variables([command])


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: [", "is no YAML"), ("- 1", "holds no mapping"), ("provider: {type: gcp}", r"provider\.type is gcp")],
)
def test_files_that_are_no_definition(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        read_sources(tmp_path / "cluster.yaml", ROOT / "serve_config.yaml")


class _Google(BaseHTTPRequestHandler):
    """The metadata server and Secret Manager of one project with one secret."""

    def do_GET(self) -> None:
        answers = {
            "/m/project/project-id": ("Metadata-Flavor", "Google", "p1"),
            "/m/instance/service-accounts/default/token": ("Metadata-Flavor", "Google", '{"access_token": "t1"}'),
            "/s/projects/p1/secrets/mine/versions/latest:access": (
                "Authorization", "Bearer t1", json.dumps({"payload": {"data": base64.b64encode(b"ab\nc").decode()}}),
            ),
        }  # fmt: skip
        header, value, body = answers.get(self.path, ("Host", None, ""))
        self.send_response(200 if self.headers[header] == value else 404)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Google)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_secret_of_google(google: str) -> None:
    assert gcp_secret.read_secret("mine", f"{google}/m", f"{google}/s") == "ab\nc"
    with pytest.raises(UserError, match="404 for the secret itself"):
        gcp_secret.read_secret("other", f"{google}/m", f"{google}/s")
    with pytest.raises(UserError, match="machines of Google's cloud only"):
        gcp_secret.read_secret("mine", "http://127.0.0.1:1", f"{google}/s")
