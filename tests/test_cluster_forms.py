"""deploy/ is what cluster.yaml says: fresh, the same bytes twice, valid to KubeRay, and to Ray the same groups."""

import copy
import gzip
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from alpaca_ray import __version__, cli
from alpaca_ray.cluster.render import TARGETS, Sources, read_sources, render, stale_files
from alpaca_ray.cluster.validate import read_schemas, validate
from alpaca_ray.lint.files import lint_files
from alpaca_ray.serve.keys import make_key

ROOT = Path(__file__).parents[1]
GROUP = "alpaca-ray.io/group"
Content = dict[str, Any]


@pytest.fixture(scope="module")
def sources() -> Sources:
    return read_sources(ROOT / "cluster.yaml", ROOT / "serve_config.yaml")


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Content:
    directory = tmp_path_factory.mktemp("schemas")
    for packed in (ROOT / "tests" / "data" / "kuberay").glob("*.gz"):
        (directory / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return read_schemas(directory)


def parsed(sources: Sources, target: str, name: str) -> Content:
    content: Content = yaml.safe_load(render(sources, target)[name])
    return content


@pytest.mark.parametrize("target", TARGETS)
def test_deploy_is_fresh(sources: Sources, target: str) -> None:
    stale = stale_files(sources, target, ROOT / "deploy" / target)
    assert not stale, f"stale in deploy/{target}: renew by `alpaca-ray cluster render --target {target}`"


def test_what_was_changed_by_hand_is_stale(sources: Sources, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "deploy" / "kuberay", tmp_path / "kuberay")
    (tmp_path / "kuberay" / "raycluster.yaml").open("a").write("# by hand\n")
    (tmp_path / "kuberay" / "left_over.yaml").write_text("")
    (tmp_path / "kuberay" / "rayjob-train.yaml").unlink()
    assert stale_files(sources, "kuberay", tmp_path / "kuberay") == [
        "left_over.yaml", "raycluster.yaml", "rayjob-train.yaml",
    ]  # fmt: skip


def backwards(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: backwards(value[key]) for key in reversed(value)}
    return [backwards(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("target", TARGETS)
def test_the_order_of_keys_changes_no_byte(sources: Sources, target: str) -> None:
    other = Sources(backwards(sources.definition), backwards(sources.serve_config), sources.run)
    assert render(other, target) == render(sources, target) == render(sources, target)


@pytest.mark.parametrize("target", TARGETS)
def test_every_file_names_the_command_that_made_it(sources: Sources, target: str) -> None:
    for text in render(sources, target).values():
        assert text.startswith(f"# Made by `alpaca-ray cluster render --target {target}`")


def groups(definition: Content) -> Content:
    """What decides which nodes a stage gets, by group."""
    return {
        kind["labels"][GROUP]: (
            {name: value for name, value in kind["resources"].items() if name in ("CPU", "GPU") and value},
            kind["labels"],
            kind.get("min_workers", 0),
            kind.get("max_workers", 0),
        )
        for kind in definition["available_node_types"].values()
    }


def test_ray_sees_the_shipped_groups_in_the_raycluster(sources: Sources) -> None:
    manifest = parsed(sources, "kuberay", "raycluster.yaml")
    manifest["metadata"]["namespace"] = "default"
    derived = _derive_autoscaling_config_from_ray_cr(manifest)
    assert groups(derived) == groups(sources.definition)
    idle_s = {kind["labels"][GROUP]: kind.get("idle_timeout_s") for kind in derived["available_node_types"].values()}
    assert idle_s == {"head": None, "generate": 300, "train": 180, "serve": 900}
    assert derived["idle_timeout_minutes"] == sources.definition["idle_timeout_minutes"]


def test_ray_sees_the_shipped_groups_on_google(sources: Sources) -> None:
    definition = parsed(sources, "gcp", "cluster.yaml")
    assert groups(definition) == groups(sources.definition)
    prepared = prepare_config(copy.deepcopy(definition))
    validate_config(prepared)
    assert not any("install" in command for command in [*prepared["setup_commands"], *prepared["head_setup_commands"]])


def test_ray_sees_the_shipped_groups_in_the_twin(sources: Sources) -> None:
    definition = parsed(sources, "local", "autoscaling.yaml")
    validate_config(prepare_config(copy.deepcopy(definition)))
    assert groups(definition) == groups(sources.definition)


@pytest.mark.parametrize(
    "name", ["raycluster", "rayjob-generate", "rayjob-train", "rayjob-evaluate", "rayjob-pipeline", "rayservice"]
)
def test_kuberay_knows_every_field(name: str, schemas: Content) -> None:
    assert validate(ROOT / "deploy" / "kuberay" / f"{name}.yaml", schemas) == []


SEEDED = [  # file, text, what it becomes, the path and the nearest name that have to be named
    (
        "raycluster",
        "enableInTreeAutoscaling:",
        "enableIntreeAutoscaling:",
        "spec.enableIntreeAutoscaling",
        "enableInTree",
    ),
    ("raycluster", "maxReplicas: 8", "maxReplica: 8", "spec.workerGroupSpecs[0].maxReplica", "maxReplicas"),
    ("raycluster", "maxReplicas: 8", "maxReplicas: '8'", "spec.workerGroupSpecs[0].maxReplicas", "'8' is not"),
    ("raycluster", "backend: rocksdb", "backend: rocks", "spec.gcsFaultToleranceOptions.backend", "rocksdb"),
    ("raycluster", "version: v2", "version: v3", "spec.autoscalerOptions.version", "v2"),
    ("raycluster", "nodeSelector:", "nodeSelectors:", "template.spec.nodeSelectors", "nodeSelector"),
    ("raycluster", "secretKeyRef:", "secretRef:", "env[1].valueFrom.secretRef", "secretKeyRef"),
    ("raycluster", "headGroupSpec:", "headGroup:", "spec.headGroup", "headGroupSpec"),
    ("rayjob-train", "ttlSecondsAfterFinished:", "ttlSeconds:", "spec.ttlSeconds", "ttlSecondsAfterFinished"),
    ("rayjob-train", "mode: token", "mode: tokens", "spec.rayClusterSpec.authOptions.mode", "token"),
    ("rayservice", "serveConfigV2:", "serveConfig:", "spec.serveConfig", "serveConfigV2"),
    ("rayservice", "drop:", "dropped:", "capabilities.dropped", "drop"),
]


@pytest.mark.parametrize(("name", "text", "changed", "path", "says"), SEEDED)
def test_a_mistake_is_found(  # noqa: PLR0917
    name: str, text: str, changed: str, path: str, says: str, schemas: Content, tmp_path: Path
) -> None:
    shipped = (ROOT / "deploy" / "kuberay" / f"{name}.yaml").read_text()
    assert text in shipped
    wrong = tmp_path / f"{name}.yaml"
    wrong.write_text(shipped.replace(text, changed, 1))
    found = [line for line in validate(wrong, schemas) if path in line]
    assert found
    assert found[0].startswith(str(wrong))
    assert any(says in line for line in found)


def test_the_server_behind_kuberay_passes_our_own_lint(sources: Sources, tmp_path: Path) -> None:
    config = tmp_path / "serve_config.yaml"
    config.write_text(parsed(sources, "kuberay", "rayservice.yaml")["spec"]["serveConfigV2"])
    key = make_key("alice", ["generate"])
    assert lint_files([config], {"ALPACA_RAY_API_KEYS": key.line}) == []
    without_keys = lint_files([config], {})  # it listens on all addresses of its pod
    assert len(without_keys) == 1
    assert "http_options.host" in without_keys[0] or "0.0.0.0" in without_keys[0]


def test_secrets_are_names_everywhere(sources: Sources) -> None:
    manifest = parsed(sources, "kuberay", "raycluster.yaml")["spec"]
    pods = [manifest["headGroupSpec"], *manifest["workerGroupSpecs"]]
    for pod in pods:
        environment = pod["template"]["spec"]["containers"][0]["env"]
        by_name = {variable["name"]: variable for variable in environment}
        for name, secret in (("OPENAI_API_KEY", "openai"), ("ALPACA_RAY_API_KEYS", "api-keys")):
            assert by_name[name] == {
                "name": name,
                "valueFrom": {"secretKeyRef": {"name": f"alpaca-ray-{secret}", "key": "value"}},
            }


def test_a_job_has_only_the_groups_of_its_stages(sources: Sources) -> None:
    own = {"generate": ["generate"], "train": ["train"], "evaluate": ["train"], "pipeline": ["generate", "train"]}
    for stage, wanted in own.items():
        spec = parsed(sources, "kuberay", f"rayjob-{stage}.yaml")["spec"]
        assert [group["groupName"] for group in spec["rayClusterSpec"]["workerGroupSpecs"]] == wanted
        assert spec["shutdownAfterJobFinishes"]


def test_the_image_is_the_same_everywhere_and_pinned(sources: Sources) -> None:
    image = sources.definition["docker"]["image"]
    version = sources.definition["metadata"]["render"]["ray_version"]
    assert image.rpartition(":")[2] == f"{__version__}-ray{version}"
    assert image in (ROOT / "deploy" / "Dockerfile").read_text()
    assert f"\nray=={version}" in (ROOT / "requirements.lock").read_text()
    for target in ("gcp", "kuberay"):
        for name, text in render(sources, target).items():
            assert image in text, name


def test_the_image_copies_what_there_is_and_is_nobodys_root() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[2:-1]]
    assert "requirements.lock" in copied
    assert all((ROOT / name).exists() for name in copied)
    assert [line for line in lines if line.startswith("USER")][-1] == "USER ubuntu"


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(ROOT / "cluster.yaml"), "--serve-config", str(ROOT / "serve_config.yaml")]
    assert cli.main(["cluster", "render", "--target", "gcp", "--out", str(tmp_path), *given]) == 0
    assert (tmp_path / "cluster.yaml").read_text() == (ROOT / "deploy" / "gcp" / "cluster.yaml").read_text()
    assert cli.main(["cluster", "validate", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml cannot be read" in capsys.readouterr().out
