"""What is legal passes `alpaca-ray lint`, whatever stands in a file does not make it fail, and each file is known."""

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from alpaca_ray.cli import main
from alpaca_ray.cluster import aws, definition
from alpaca_ray.lint import recipes, together
from alpaca_ray.lint.files import default_files, kind_of, lint_texts
from alpaca_ray.lint.secrets import secrets
from alpaca_ray.serve import lint as serve_lint
from alpaca_ray.settings import recipe_names
from alpaca_ray.yaml_lines import Fields
from tests.lint_seeds import ROOT, SHIPPED

CLUSTER, SERVE, RECIPE = SHIPPED.values()
NODE = "ImageId: ami-0123456789abcdef0, InstanceType: "
GROUP = "    labels: {alpaca-ray.io/group: judge}\n    min_workers: 0\n    max_workers: 3\n"


def put(text: str, *changes: tuple[str, str]) -> str:
    for right, wrong in changes:
        assert right in text, right
        text = text.replace(right, wrong, 1)
    return text


def add_type(resources: str, node_config: str) -> str:
    new = f"  judge:\n{GROUP}    resources: {{{resources}}}\n    node_config: {{{node_config}}}\n"
    return put(CLUSTER, ("\nhead_node_type:", f"\n{new}\nhead_node_type:"))


LEGAL = {
    "another region": put(
        CLUSTER, ("region: us-west-2", "region: eu-west-1\n  availability_zone: eu-west-1a,eu-west-1b")
    ),
    "a GPU group more": add_type("CPU: 48, GPU: 4", f"{NODE}g6e.12xlarge"),
    "a type that the table does not know": add_type("CPU: 192, GPU: 2, shelf: 1", f"{NODE}trn1.32xlarge"),
    "fewer CPUs offered than there are": add_type("CPU: 4", f"{NODE}m7i.2xlarge"),
    "a launch template": add_type("CPU: 8", "LaunchTemplate: {LaunchTemplateName: judge, Version: '3'}"),
    "subnets and tags": add_type(
        "CPU: 8",
        f"{NODE}m7i.2xlarge, SubnetIds: [subnet-1, subnet-2], SecurityGroupIds: [sg-1], "
        "TagSpecifications: [{ResourceType: instance, Tags: [{Key: team, Value: nlp}]}]",
    ),
    "spot with a price": add_type(
        "CPU: 8", f"{NODE}m6i.2xlarge, InstanceMarketOptions: {{MarketType: spot, SpotOptions: {{MaxPrice: '0.2'}}}}"
    ),
    "keys of one's own": put(
        CLUSTER.replace("      ImageId:", "      KeyName: team\n      ImageId:"),
        ("ssh_user: ubuntu", "ssh_user: ubuntu\n  ssh_private_key: ~/.ssh/team.pem"),
    ),
    "inside addresses": put(
        CLUSTER, ("type: aws", "type: aws\n  use_internal_ips: true\n  security_group: {GroupName: ray}")
    ),
    "an office's addresses": put(
        CLUSTER,
        (
            "type: aws",
            "type: aws\n  security_group: {IpPermissions: [{FromPort: 8000, ToPort: 8000, IpProtocol: TCP, "
            "IpRanges: [{CidrIp: 203.0.113.0/24}]}]}",
        ),
    ),
    "no head limits": put(CLUSTER, ("resources: {CPU: 0}", "resources: {CPU: 0}\n    max_workers: 0")),
    "more labels": put(
        CLUSTER, ("{alpaca-ray.io/group: serve}", "{alpaca-ray.io/group: serve, example.org/team: nlp_2}")
    ),
    "the metadata server": put(
        CLUSTER, ("\nworker_setup_commands: []", "\nworker_setup_commands: [curl -s http://169.254.169.254/latest]")
    ),
    "a pinned Ray": put(
        CLUSTER, ("\nhead_setup_commands: []", "\nhead_setup_commands: ['pip install \"ray[default]==2.60.0\" boto3']")
    ),
    "other variables": put(
        CLUSTER, ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=token HF_TOKEN=$(cat /run/hf) NCCL_DEBUG=INFO")
    ),
    "options with a space": put(CLUSTER, ("--dashboard-host=127.0.0.1", "--dashboard-host localhost --num-cpus 0")),
    "the only group": put(
        CLUSTER, ("\n  train:\n", "\n  tune:\n"), ("{alpaca-ray.io/group: train}", "{alpaca-ray.io/group: tune}")
    ),
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal_clusters_pass(name: str) -> None:
    assert lint_texts({"cluster.yaml": LEGAL[name]}, {}) == []


ANCHORS = """\
cluster_name: a
max_workers: 2
idle_timeout_minutes: 5
provider: {type: gcp, region: us-west1, availability_zone: us-west1-a, project_id: null}
auth: {ssh_user: ubuntu}
available_node_types:
  head: &node
    labels: {alpaca-ray.io/group: head}
    resources: {CPU: 0}
    node_config: {machineType: n2-standard-8}
  generate:
    <<: *node
    labels: {alpaca-ray.io/group: generate}
    resources: {CPU: 8}
    max_workers: 2
head_node_type: head
file_mounts: {/home/ubuntu/.ray/auth_token: ~/.ray/auth_token}
setup_commands: []
head_start_ray_commands:
  - RAY_AUTH_MODE=token ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml
worker_start_ray_commands: ["RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379"]
"""


def test_anchors_and_other_clouds_pass() -> None:
    assert lint_texts({"a": ANCHORS}, {}) == []
    own_times = put(ANCHORS, ("idle_timeout_minutes: 5\n", ""), ("{CPU: 8}\n", "{CPU: 8}\n    idle_timeout_s: 120\n"))
    assert lint_texts({"a": own_times}, {}) == []
    misspelt = ANCHORS.replace("    resources: {CPU: 8}\n", "    resources: {CPU: 8}\n    resource: {}\n")
    assert lint_texts({"a": misspelt}, {}) == [
        "a:15: available_node_types.generate.resource: no such field; did you mean 'resources'?"
    ]


DOCKER = """docker:
  image: registry.example.org:5000/alpaca-ray:0.1.0
  head_image: a/b@sha256:{digest}
  container_name: ray
  run_options: [--shm-size=10g, -e RAY_AUTH_MODE=token]
""".format(digest="0" * 64)


def test_a_container_may_set_the_mode() -> None:
    inside = ANCHORS.replace("RAY_AUTH_MODE=token ", "") + DOCKER
    assert lint_texts({"a": inside}, {}) == []
    without = lint_texts({"a": inside.replace(", -e RAY_AUTH_MODE=token", "")}, {})
    assert [line.split(": ")[1] for line in without] == ["head_start_ray_commands.0", "worker_start_ray_commands.0"]


PLACED = "num_gpus: 0 # 1 puts the model on a GPU\n        label_selector: {}"


@pytest.mark.parametrize(
    "text",
    [
        put(
            SERVE,
            (PLACED, "num_gpus: 1\n        label_selector: {alpaca-ray.io/group: serve}"),
            ("num_replicas: 1", "num_replicas: 4"),
        ),
        put(SERVE, (PLACED, "num_gpus: 1\n        label_selector: {alpaca-ray.io/group: '!in(train, head)'}")),
        put(SERVE, ("host: 127.0.0.1", "host: 0.0.0.0"), ("key_file: null", "key_file: /run/secrets/keys")),
        put(SERVE, ("    args:", "    runtime_env: {env_vars: {HF_HOME: /models, NCCL_DEBUG: INFO}}\n    args:")),
        put(RECIPE, ("num_workers: 8", "num_workers: [8, 32]")),
        put(RECIPE, ("num_workers: 8", "num_workers: 16")),
        put(RECIPE, ("{alpaca-ray.io/group: generate}", "{alpaca-ray.io/group: 'in(generate, serve)'}")),
        put(RECIPE, ("top_p: 1.0", "top_p: 1.0\n    api_key_env: TEAM_KEY")),
    ],
)
def test_legal_requests_pass_beside_the_cluster(text: str) -> None:
    assert lint_texts({"cluster.yaml": CLUSTER, "other": text}, {}) == []


def test_all_that_ships_is_right(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert {path.name for path in default_files(ROOT)} == {
        "cluster.yaml",
        "serve_config.yaml",
        *(f"{name}.yaml" for name in recipe_names()),
    }
    assert main(["lint"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out


def test_a_kind_is_known_by_what_stands_in_it() -> None:
    for text, kind in zip(SHIPPED.values(), ("cluster", "serve", "recipe"), strict=True):
        values = yaml.safe_load(text)
        assert kind_of(values) == kind
        for name in values:  # misspelt names are near enough
            assert kind_of({f"{key}s" if key == name else key: value for key, value in values.items()}) == kind
    assert kind_of({"colour": "red"}) is None
    assert lint_texts({"a.yaml": "colour: red"}, {}) == [
        "a.yaml:1: neither a cluster.yaml, nor a serve_config.yaml, nor a recipe"
    ]
    assert lint_texts({"a.yaml": "a: &a [*a]"}, {}) == ["a.yaml:1: an alias of what it stands in"]


def test_what_cannot_be_checked_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "botocore", None)  # as where it is not installed
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    assert main(["lint", str(ROOT / "cluster.yaml")]) == 0
    assert capsys.readouterr().err == f"note: {aws.MISSING}\n"
    assert main(["lint", str(ROOT / "serve_config.yaml")]) == 0
    assert capsys.readouterr().err == ""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


ODD: list[Any] = [None, True, -1, 1.5, "x", "a 'b", [], [None, 1, {}], {}, {"a": None, 1: 2}]


def everywhere(text: str) -> Iterator[dict[Any, Any]]:
    values = yaml.safe_load(text)
    for number, place in enumerate(places(values)):
        changed = copy.deepcopy(values)
        target = changed
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = ODD[number % len(ODD)]
        yield changed
        target[place[-1]] = ODD[(number + 3) % len(ODD)]
        yield changed


def test_no_value_anywhere_makes_it_fail() -> None:
    groups = definition.groups(yaml.safe_load(CLUSTER))
    recipe = recipes.read(yaml.safe_load(RECIPE))
    assert recipe is not None
    demands = [*together.of_recipe(recipe), *together.of_serve(yaml.safe_load(SERVE))]
    for values in everywhere(CLUSTER):
        found = definition.check(Fields(values, {(): 1}, (), ()))
        assert all(problem.message for problem in found)
        list(together.unmet(demands, definition.groups(values), "cluster.yaml"))
        list(secrets(values))
    for values in everywhere(RECIPE):
        recipes.check(Fields(values, {(): 1}, (), ()))
        config = recipes.read(values)
        list(together.unmet([] if config is None else together.of_recipe(config), groups, "cluster.yaml"))
    for values in everywhere(SERVE):
        list(together.unmet(together.of_serve(values), groups, "cluster.yaml"))
        list(secrets(values))


# Names that are the user's to choose: types of nodes, labels, mounts, metadata.
CHOSEN = ("available_node_types.", "labels.", "file_mounts.", "label_selector.")


def is_chosen(path: tuple[Any, ...]) -> bool:
    above = ".".join(map(str, path[:-1])) + "."
    return above.endswith(CHOSEN) or above.startswith("metadata.")


@pytest.mark.parametrize("text", [CLUSTER, SERVE, RECIPE], ids=["cluster", "serve", "recipe"])
def test_every_name_that_is_misspelt_is_found_with_the_right_one(text: str) -> None:
    if text is CLUSTER and not aws.has_botocore():
        pytest.skip(aws.MISSING)
    values = yaml.safe_load(text)
    names = [path for path in places(values) if isinstance(path[-1], str) and not is_chosen(path)]
    assert len(names) > 30
    for path in names:
        changed = copy.deepcopy(values)
        target = changed
        for key in path[:-1]:
            target = target[key]
        wrong = path[-1][:-1] + path[-1][-1] * 2
        target[wrong] = target.pop(path[-1])
        field = ".".join(map(str, (*path[:-1], wrong)))
        fields = Fields(changed, {(): 1}, (), ())
        found = definition.check(fields) if text is CLUSTER else recipes.check(fields)
        if text is SERVE:
            found = serve_lint.check(fields, {})
        about = [problem.message for problem in found if problem.field == field]
        assert any(repr(path[-1]) in message for message in about), (field, about)
