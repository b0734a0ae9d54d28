"""`metadata.render` of cluster.yaml: what its other forms need and AWS does not have."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from alpaca_ray.cluster.machine_types import MACHINES, GcpMachine
from alpaca_ray.config import ConfigError, Strict, UserError, explain

WHERE = "metadata.render"


class MachineOption(Strict):
    """The machine of Google's cloud in place of an instance type."""

    machine_type: str
    num_cpus: PositiveInt
    accelerator: str | None = None  # only where it does not come with the machine type
    num_accelerators: Annotated[int, Field(ge=0)] = 0


class GcpOptions(Strict):
    """Where on Google's cloud, and from which image. `machine_types`: by instance type, in place of the table."""

    project_id: str
    region: str
    availability_zone: str
    source_image: str
    machine_types: dict[str, MachineOption] = Field(default_factory=dict)


class PodOption(Strict):
    """What a pod asks for in place of an instance type."""

    num_cpus: PositiveFloat
    memory_gib: PositiveInt


class KuberayOptions(Strict):
    """Where the head keeps its state, and which nodes the groups' pods may use. `pods`: by instance type."""

    gcs_backend: Literal["rocksdb", "redis"] = "rocksdb"
    gcs_storage: str = "10Gi"
    storage_class: str | None = None  # None: the default of the Kubernetes cluster
    redis_address: str | None = None
    redis_secret: str | None = None  # a Kubernetes Secret with the key `password`
    node_selectors: dict[str, dict[str, str]] = Field(
        default_factory=dict
    )  # by group; without one: the group's own labels
    pods: dict[str, PodOption] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _redis_has_an_address(self) -> "KuberayOptions":
        if (self.gcs_backend == "redis") != (self.redis_address is not None):
            raise ValueError("gcs_backend: redis and redis_address go together; give both or neither")
        return self


class RenderOptions(Strict):
    """The whole of `metadata.render`."""

    ray_version: str
    recipe: str
    storage_path: str
    gcp: GcpOptions
    kuberay: KuberayOptions = KuberayOptions()


class _Docker(BaseModel):
    image: str


class _NodeSettings(BaseModel):
    InstanceType: str


class _NodeType(BaseModel):
    resources: dict[str, int]
    node_config: _NodeSettings
    labels: dict[str, str] = Field(default_factory=dict)


class _Definition(BaseModel):
    """What the renderers read of cluster.yaml, by Ray's names; the rest passes through."""

    cluster_name: str
    max_workers: int
    docker: _Docker
    available_node_types: dict[str, _NodeType]
    head_node_type: str
    head_start_ray_commands: list[str]
    worker_start_ray_commands: list[str]

    @model_validator(mode="after")
    def _has_its_head(self) -> "_Definition":
        if self.head_node_type not in self.available_node_types:
            raise ValueError(
                f"head_node_type {self.head_node_type!r} is none of {', '.join(self.available_node_types)}"
            )
        return self


def check_definition(definition: dict[str, Any], where: str) -> None:
    """Raises ConfigError for a field that the renderers need and that is missing or of another type."""
    try:
        _Definition.model_validate(definition)
    except ValidationError as error:
        raise ConfigError(explain(error, where, _Definition)) from None


def read_options(definition: dict[str, Any]) -> RenderOptions:
    """Raises ConfigError that names the field and, for an unknown one, the nearest valid name."""
    values = (definition.get("metadata") or {}).get("render")
    if not isinstance(values, dict):
        raise ConfigError(f"cluster.yaml: {WHERE} is missing; the other forms need it: see docs/operations.md")
    try:
        return RenderOptions.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, f"cluster.yaml: {WHERE}", RenderOptions)) from None


def gcp_machine(instance_type: str, options: GcpOptions) -> GcpMachine:
    """Raises UserError for an instance type that neither the options nor the table know."""
    option = options.machine_types.get(instance_type)
    if option is not None:
        return GcpMachine(option.machine_type, option.num_cpus, option.accelerator, option.num_accelerators)
    if instance_type not in MACHINES:
        raise _unknown(instance_type, "gcp.machine_types", "{machine_type: n2-standard-8, num_cpus: 8}")
    return MACHINES[instance_type].gcp


# A pod that asks for all of a machine never starts: the kubelet, the system and daemons such as log collectors hold
# some of it. 10 % of the CPUs and 15 % of the memory are what GKE and EKS take on these sizes, with room to spare.
CPU_SHARE, MEMORY_SHARE = 0.9, 0.85


def pod_size(instance_type: str, options: KuberayOptions) -> PodOption:
    """CPUs and memory that a pod asks for. Raises UserError for an unknown instance type."""
    option = options.pods.get(instance_type)
    if option is not None:
        return option
    if instance_type not in MACHINES:
        raise _unknown(instance_type, "kuberay.pods", "{num_cpus: 7, memory_gib: 27}")
    machine = MACHINES[instance_type]
    return PodOption(
        num_cpus=max(1, int(machine.num_cpus * CPU_SHARE)), memory_gib=int(machine.memory_gib * MEMORY_SHARE)
    )


def _unknown(instance_type: str, key: str, example: str) -> UserError:
    known = ", ".join(sorted(MACHINES))
    return UserError(
        f"cluster.yaml: nothing is known about InstanceType {instance_type} (only {known}): add it as "
        f"{WHERE}.{key}: {{{instance_type}: {example}}}"
    )
