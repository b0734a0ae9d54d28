"""The strict check of cluster.yaml, and its groups. Ray lets typos in `provider` and `node_config` pass.

Names and types are those of Ray's own schema, closed where Ray leaves it open; `provider` and `node_config` are checked
for AWS (cluster/aws.py), commands for what they open, download or leave out (cluster/commands.py).
"""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ray._private import label_utils

from alpaca_ray.cluster import aws, commands
from alpaca_ray.config import nearest
from alpaca_ray.yaml_lines import Check, Fields, Location, Problem, mapping, mappings, parse, texts

GROUP = "alpaca-ray.io/group"
TYPES = "available_node_types"
OWN_RESOURCES = ("CPU", "GPU", "TPU", "memory", "object_store_memory")
COMMANDS = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
SETUP_COMMANDS = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
# Ray fills in what is missing from ray/autoscaler/aws/defaults.yaml.
WITHOUT = {
    "available_node_types": "Ray starts example nodes of its own",
    "head_node_type": "Ray looks for a type of its own, ray.head.default",
    "max_workers": "Ray starts 2 nodes at most",
    "idle_timeout_minutes": "say when idle nodes end",
    "setup_commands": "Ray's own install a nightly Ray; give [] if the image holds everything",
    "head_start_ray_commands": "Ray's own open the dashboard to the network, without a token",
    "worker_start_ray_commands": "Ray's own start workers without a token",
}


@dataclass(frozen=True)
class Group:
    """A node type: what a node of it offers, and how many there can be."""

    name: str
    labels: Mapping[str, str]
    resources: Mapping[str, float]
    max_nodes: int


def lint(text: str) -> list[Problem]:
    """All that is wrong with a cluster.yaml, by line."""
    fields = parse(text)
    return [fields] if isinstance(fields, Problem) else check(fields)


def check(fields: Fields) -> list[Problem]:
    """As `lint`, of a file that is read."""
    found = _Check(fields)
    for part in (found.names, found.provider, found.counts, found.head, found.types, found.shell, found.access):
        part()
    return found.found()


def groups(values: Mapping[str, Any]) -> list[Group]:
    """The node types that jobs can have nodes of: all but the head's. What is no group by its types is left out."""
    most = _count(values.get("max_workers"), 0)
    return [
        Group(
            str(name),
            {str(key): str(value) for key, value in mapping(kind, "labels").items()},
            {str(key): value for key, value in mapping(kind, "resources").items() if isinstance(value, int | float)},
            min(_count(kind.get("max_workers"), most), most),
        )
        for name, kind in mappings(values.get(TYPES))
        if name != values.get("head_node_type")
    ]


class _Check(Check):
    """What is wrong with one cluster.yaml."""

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.cloud = mapping(self.values, "provider").get("type")
        self.docker = mapping(self.values, "docker")
        # Options of `docker run` may set variables and mount files too.
        self.options = " ".join(text for path, text in texts(self.docker) if "run_options" in str(path))
        self.head_type = self.values.get("head_node_type")

    def names(self) -> None:
        """Ray's schema, and what Ray would fill in where something is missing."""
        self.schema(self.values, _ray_schema(), ())
        timed = all(
            "idle_timeout_s" in kind for name, kind in mappings(self.values.get(TYPES)) if name != self.head_type
        )
        for name, otherwise in WITHOUT.items():
            if name not in self.values and not (name == "idle_timeout_minutes" and timed):
                self.say((name,), f"missing: {otherwise}")

    def provider(self) -> None:
        """The keys that the cloud's provider reads."""
        provider = mapping(self.values, "provider")
        if isinstance(self.cloud, str) and self.cloud not in _clouds():
            self.say(("provider", "type"), f"Ray has no provider {self.cloud!r}{nearest(self.cloud, _clouds())}")
        if self.cloud == "gcp":  # it reads no other than Ray's schema names
            known = _ray_schema()["properties"]["provider"]["properties"]
            self.only(provider, sorted({*known, *aws.ANY_CLOUD}), ("provider",))
        if self.cloud not in ("aws", None):
            return
        self.schema(provider, aws.PROVIDER, ("provider",))
        region, zones = provider.get("region"), provider.get("availability_zone")
        if isinstance(region, str) and aws.has_botocore() and region not in aws.regions():
            self.say(("provider", "region"), f"EC2 has no region {region!r}{nearest(region, aws.regions())}")
        for zone in zones.split(",") if isinstance(zones, str) else ():
            if isinstance(region, str) and not zone.strip().startswith(region):
                self.say(("provider", "availability_zone"), f"{zone.strip()} is not in the region {region}")
        for index, rule in mappings(mapping(provider, "security_group").get("IpPermissions")):
            self._open_port(rule, ("provider", "security_group", "IpPermissions", index))

    def counts(self) -> None:
        """How many nodes there may be, and how fast."""
        most = _count(self.values.get("max_workers"), None)
        kinds = dict(mappings(self.values.get(TYPES)))
        for name, kind in kinds.items():
            fewest, here = _count(kind.get("min_workers"), 0), _count(kind.get("max_workers"), None)
            for field in ("min_workers", "max_workers", "idle_timeout_s"):
                if isinstance(kind.get(field), int | float) and kind[field] < 0:
                    self.say((TYPES, name, field), f"{kind[field]} is below 0")
            if here is not None and fewest > here:
                self.say((TYPES, name, "min_workers"), f"{fewest} is above this type's max_workers, {here}")
            if most is not None and here is not None and here > most:
                self.say((TYPES, name, "max_workers"), f"{here} is above max_workers of the whole cluster, {most}")
        fewest_of_all = sum(_count(kind.get("min_workers"), 0) for kind in kinds.values())
        if most is not None and fewest_of_all > most:
            self.say(("max_workers",), f"{most} is below the sum of all min_workers, {fewest_of_all}")
        if self.values.get("upscaling_speed") == 0:
            self.say(("upscaling_speed",), "with 0 the cluster never grows")

    def head(self) -> None:
        """No work on the head, no interruption of it, no second one."""
        kinds = dict(mappings(self.values.get(TYPES)))
        if not isinstance(self.head_type, str) or not kinds:
            return
        if self.head_type not in kinds:
            hint = nearest(str(self.head_type), [str(name) for name in kinds])
            self.say(("head_node_type",), f"{self.head_type!r} is no type of {TYPES}{hint}")
            return
        kind, path = kinds[self.head_type], (TYPES, self.head_type)
        if mapping(kind, "resources").get("CPU") != 0:
            message = "jobs would run on the head, and with it the whole cluster falls: give {CPU: 0}"
            self.say((*path, "resources", "CPU"), message)
        if mapping(kind, "resources").get("GPU", 0):
            self.say(
                (*path, "resources", "GPU"), "a GPU on the head is paid for as long as the cluster stands: leave it out"
            )
        for field in ("min_workers", "max_workers"):
            if kind.get(field, 0):
                self.say((*path, field), "a worker of the head's type offers no CPU to any job: give 0")
        if place := _spot(mapping(kind, "node_config")):
            self.say((*path, "node_config", *place), "the head on spot: when it goes, all jobs go. Take it on demand")

    def types(self) -> None:
        """Labels, resources and EC2's settings of each type."""
        stages: dict[str, Any] = {}
        for name, kind in mappings(self.values.get(TYPES)):
            path = (TYPES, name)
            self._labels(mapping(kind, "labels"), (*path, "labels"))
            group = mapping(kind, "labels").get(GROUP)
            if group is not None and stages.setdefault(str(group), name) != name:
                self.say(
                    (*path, "labels", GROUP), f"{stages[str(group)]} has this label too: jobs cannot tell them apart"
                )
            for resource in mapping(kind, "resources"):
                meant = _own_resource(str(resource))
                if meant is not None and meant != resource:
                    self.say((*path, "resources", resource), f"to Ray this is not {meant}; did you mean {meant!r}?")
            if self.cloud == "aws" and isinstance(kind.get("node_config"), dict):
                self._node(kind, path)

    def shell(self) -> None:
        """Of each command what it opens, downloads or leaves out."""
        heads = [text for _, text in texts(self.values.get("head_start_ray_commands")) if commands.starts_ray(text)]
        port = commands.port_of(heads[0]) if heads else None
        for name in SETUP_COMMANDS:
            self._each(name, commands.setup_faults)
        self._each("head_start_ray_commands", lambda text: self._start(text, commands.head_faults))
        self._each(
            "worker_start_ray_commands", lambda text: self._start(text, lambda t: commands.worker_faults(t, port))
        )
        for name in ("head_start_ray_commands", "worker_start_ray_commands"):
            given = self.values.get(name)
            if not isinstance(given, list) or self.cloud in ("external", "fake_multinode"):  # these start it themselves
                continue
            if not any(commands.starts_ray(str(command)) for command in given):
                self.say((name,), "no command says `ray start`")

    def access(self) -> None:
        """How nodes are reached, and with which token and image."""
        auth, mounts = mapping(self.values, "auth"), mapping(self.values, "file_mounts")
        for name, kind in mappings(self.values.get(TYPES)):
            config = mapping(kind, "node_config")
            if self.cloud == "aws" and "ssh_private_key" in auth and not {"KeyName", "UserData"} & set(config):
                message = "missing: auth names an ssh_private_key, so each type names its key pair"
                self.say((TYPES, name, "node_config", "KeyName"), message)
        starts = [text for name in COMMANDS for _, text in texts(self.values.get(name))]
        has_token = any(str(target).endswith("auth_token") for target in mounts) or "AUTH_TOKEN" in self.options.upper()
        if starts and not has_token and not any(map(commands.brings_token, starts)):
            message = (
                "missing: each node would make a token of its own; add /home/USER/.ray/auth_token: ~/.ray/auth_token"
            )
            self.say(("file_mounts", "auth_token"), message)
        self._images(self.docker, ("docker",))
        for name, kind in mappings(self.values.get(TYPES)):
            self._images(mapping(kind, "docker"), (TYPES, name, "docker"))

    def _images(self, docker: Mapping[str, Any], path: Location) -> None:
        for name in ("image", "head_image", "worker_image"):
            image = docker.get(name)
            if isinstance(image, str) and image and not _is_pinned(image):
                self.say((*path, name), f"{image} is another one tomorrow: name a release or a digest")

    def _each(self, name: str, faults: Callable[[str], Iterator[commands.Fault]]) -> None:
        given = self.values.get(name)
        for index, command in enumerate(given if isinstance(given, list) else []):
            for fault in faults(command) if isinstance(command, str) else ():
                self.say((name, index), fault.message, fault.fragment)

    def _start(self, text: str, faults: Callable[[str], Iterator[commands.Fault]]) -> Iterator[commands.Fault]:
        if commands.starts_ray(text):
            yield from commands.start_faults(text, "RAY_AUTH_MODE=token" in self.options)
            yield from faults(text)
        else:
            yield from commands.setup_faults(text)

    def _labels(self, labels: Mapping[Any, Any], path: Location) -> None:
        if GROUP not in labels:
            keys = [str(key) for key in labels]
            near = nearest(GROUP, keys)
            self.say(
                (*path, *(k for k in keys if near and repr(k) in near)),
                f"missing: {GROUP}, by which jobs find their nodes",
            )
        for key, value in labels.items():
            try:
                label_utils.validate_node_label_syntax({str(key): value if isinstance(value, str) else ""})
                label_utils.validate_node_labels({str(key): ""})
            except ValueError as error:
                self.say((*path, str(key)), str(error))

    def _node(self, kind: Mapping[str, Any], path: Location) -> None:
        config, resources_ = kind["node_config"], mapping(kind, "resources")
        if aws.has_botocore():
            self.schema(config, aws.node_schema(), (*path, "node_config"))
        for name in ("InstanceType", "ImageId"):
            if name not in config and "LaunchTemplate" not in config:
                otherwise = (
                    "EC2 needs it" if name == "InstanceType" else "Ray takes an image of its own, without our software"
                )
                self.say((*path, "node_config", name), f"missing: {otherwise}")
        if "NetworkInterfaces" in config:
            for name in {"SubnetId", "SubnetIds", "SecurityGroupIds"} & set(config):
                self.say((*path, "node_config", name), "Ray takes this or NetworkInterfaces, not both")
        size = aws.size_of(str(config.get("InstanceType")))
        if size is not None:
            self._fits(resources_, size, str(config["InstanceType"]), (*path, "resources"))

    def _fits(self, given: Mapping[str, Any], size: tuple[int, int], kind: str, path: Location) -> None:
        cpus, gpus = size
        if isinstance(given.get("CPU"), int) and given["CPU"] > cpus:
            self.say((*path, "CPU"), f"{given['CPU']} is above what {kind} has, {cpus}")
        if path[1] != self.head_type and given.get("GPU", 0) != gpus:
            self.say((*path, "GPU"), f"{given.get('GPU', 0)} is not what {kind} has, {gpus}")

    def _open_port(self, rule: Mapping[str, Any], path: Location) -> None:
        everywhere = {"0.0.0.0/0", "::/0"} & {text for _, text in texts([rule.get("IpRanges"), rule.get("Ipv6Ranges")])}
        if everywhere and (rule.get("FromPort"), rule.get("ToPort")) != (22, 22):
            self.say(path, f"opens Ray's ports to the whole internet ({everywhere.pop()}): name your own addresses")


@cache
def _ray_schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((resources.files("ray.autoscaler") / "ray-schema.json").read_text("utf-8"))
    return schema


def _clouds() -> list[str]:
    from ray.autoscaler._private.providers import _NODE_PROVIDERS

    return list(_NODE_PROVIDERS)


def _own_resource(name: str) -> str | None:
    """Which of Ray's own resources a name means, by its letters; a name with digits is somebody's own."""
    own = {resource.lower(): resource for resource in OWN_RESOURCES}
    near = difflib.get_close_matches(name.lower(), list(own), n=1, cutoff=0.8)
    return own[near[0]] if near and name.replace("_", "").isalpha() else None


def _count(value: Any, otherwise: Any) -> Any:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _spot(config: Mapping[str, Any]) -> Location | None:
    """Where a node's settings say spot, AWS' or GCP's; None: on demand."""
    if mapping(config, "InstanceMarketOptions").get("MarketType") == "spot":
        return ("InstanceMarketOptions", "MarketType")
    scheduling = mapping(config, "scheduling")
    return ("scheduling",) if scheduling.get("preemptible") or scheduling.get("provisioningModel") == "SPOT" else None


def _is_pinned(image: str) -> bool:
    if "@sha256:" in image:
        return True
    tag = image.rpartition("/")[2].partition(":")[2]
    return tag != "" and not tag.startswith(("latest", "nightly"))
