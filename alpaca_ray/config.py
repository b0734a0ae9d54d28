"""One frozen, strict config per stage, and what a run's results depend on of it."""

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

STAGES = ("generate", "train", "evaluate")
Quantization = Literal["float16", "int8"]  # what a linear layer's weights are kept in

# Marks a field that says where or how fast a stage runs, not what it makes: such a field is no part of the
# config hash, so a run can go on with another number of workers or through another endpoint.
OPERATIONAL = "operational"


class UserError(ValueError):
    """Something that the user can mend. The text says what is wrong, where, and what to do about it."""


class ConfigError(UserError):
    """A recipe, config file, environment variable or option that is not valid."""


class Strict(BaseModel):
    """Frozen; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Placement(Strict):
    """What one worker of a stage asks Ray for."""

    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    label_selector: dict[str, str] = {}


class Price(Strict):
    """What a model costs, in US dollars per million tokens."""

    input_usd_per_million: Annotated[float, Field(ge=0)]
    output_usd_per_million: Annotated[float, Field(ge=0)]


class TeacherConfig(Strict):
    """The model that writes the demonstrations, behind an OpenAI-compatible API."""

    model: str = "gpt-3.5-turbo-instruct"
    base_url: Annotated[str | None, OPERATIONAL] = None  # None: OPENAI_BASE_URL, else OpenAI's own
    api_key_env: Annotated[str, OPERATIONAL] = "OPENAI_API_KEY"  # the variable's name, never the key
    max_tokens: PositiveInt = 3072
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    timeout_s: Annotated[PositiveFloat, OPERATIONAL] = 120.0
    max_attempts: Annotated[PositiveInt, OPERATIONAL] = 6  # per request, those refused for the rate not counted
    max_wait_s: Annotated[PositiveFloat, OPERATIONAL] = 900.0  # how long a run waits without a single answer
    verify_model: Annotated[bool, OPERATIONAL] = True  # an answer by another model than the one asked for stops the run
    price: Annotated[Price | None, OPERATIONAL] = None  # None: the price table of the package


class LimitsConfig(Strict):
    """What the teacher's API allows, over the whole cluster. None: what its headers say, else found by trying."""

    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    window_s: PositiveFloat = 60.0  # of the server's sliding window; another value is for tests


class BudgetConfig(Strict):
    """Where a run stops, over all its tries. None: no stop."""

    max_usd: Annotated[float | None, Field(ge=0)] = None
    max_tokens: Annotated[int | None, Field(ge=0)] = None  # prompts and completions together


class GenerateConfig(Strict):
    """Self-instruct (Wang et al. 2023) in Alpaca's form: one request asks for many new tasks."""

    seed: int = 0
    num_instructions: PositiveInt
    seed_tasks: Annotated[str | None, OPERATIONAL] = None  # a path; None: the 175 tasks of the package
    num_examples_per_prompt: PositiveInt = 3
    num_tasks_per_prompt: PositiveInt = 20  # numbered up to this, the examples included
    prompt_style: Literal["alpaca", "chat", "json"] = "alpaca"  # completions API; chat API; chat API with a JSON schema
    novelty_threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    evaluation_tasks: Annotated[str | None, OPERATIONAL] = None  # what no row may repeat; None: the 60 of the package
    skip_filters: list[str] = []  # names from generate/filters.py
    similarity: bool = True  # the 10 nearest of each row and its mean, as Alpaca's metadata has them
    max_requests: Annotated[PositiveInt, OPERATIONAL] = 10_000
    requests_per_round: PositiveInt = 512
    max_failed_share: Annotated[float, Field(ge=0, le=1), OPERATIONAL] = 0.2
    teacher: TeacherConfig = TeacherConfig()
    limits: Annotated[LimitsConfig, OPERATIONAL] = LimitsConfig()
    budget: Annotated[BudgetConfig, OPERATIONAL] = BudgetConfig()
    mode: Annotated[Literal["online", "batch"], OPERATIONAL] = "online"  # batch: OpenAI's Batch API, half the price
    num_actors: Annotated[PositiveInt, OPERATIONAL] = 4
    concurrent_requests_per_actor: Annotated[PositiveInt, OPERATIONAL] = 16
    placement: Annotated[Placement, OPERATIONAL] = Placement()

    @model_validator(mode="after")
    def _asks_for_new_tasks(self) -> "GenerateConfig":
        if self.num_tasks_per_prompt <= self.num_examples_per_prompt:
            raise ValueError("num_tasks_per_prompt must be above num_examples_per_prompt: it counts the examples too")
        return self


class LoraConfig(Strict):
    """Low-rank adapters (Hu et al. 2021) on the named linear layers; the base weights stay as they are."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0  # the adapters' product is scaled by alpha / rank
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class TrainConfig(Strict):
    """Supervised fine-tuning with Alpaca's recipe; the published 7B values are in `recipes/alpaca_7b.yaml`."""

    base_model: str
    seed: int = 0
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    max_length: PositiveInt = 512
    num_epochs: PositiveInt = 3
    global_batch_size: PositiveInt = 128
    micro_batch_size: PositiveInt = 4  # rows in memory at once, of `max_length` tokens each where rows are packed
    packing: bool = True  # several examples in a row; False: one in a row, padded to the longest
    loss_normalization: Literal["global", "micro_batch"] = "global"  # mean over target tokens; Alpaca: micro_batch
    learning_rate: PositiveFloat = 2e-5
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    export_dtype: Literal["bfloat16", "float32"] = "float32"
    lora: LoraConfig | None = None  # None: all weights are trained
    strategy: Literal["fsdp", "deepspeed"] = "fsdp"
    zero_stage: Annotated[int, Field(ge=1, le=3)] = 3  # of DeepSpeed
    cpu_offload: Annotated[bool, OPERATIONAL] = False  # masters and optimizer in the host's memory
    activation_checkpointing: Annotated[bool, OPERATIONAL] = False
    compile: Annotated[bool, OPERATIONAL] = False  # each decoder layer, by torch.compile
    checkpoint_every_steps: Annotated[PositiveInt, OPERATIONAL] = 100
    checkpoint_async: Annotated[bool, OPERATIONAL] = True  # written while training goes on
    checkpoints_to_keep: Annotated[PositiveInt, OPERATIONAL] = 2  # the newest
    keep_best: Annotated[bool, OPERATIONAL] = False  # and the one of the lowest held-out loss
    evaluate_every_steps: Annotated[PositiveInt | None, OPERATIONAL] = None  # held-out loss; None: with checkpoints
    max_failures: Annotated[int, Field(ge=-1), OPERATIONAL] = 3
    num_workers: Annotated[PositiveInt | tuple[PositiveInt, PositiveInt], OPERATIONAL] = 1  # or [min, max]: elastic
    start_timeout_s: Annotated[PositiveFloat, OPERATIONAL] = 600.0  # a GPU node takes minutes to come up
    peak_tflops: Annotated[PositiveFloat | None, OPERATIONAL] = None  # of one device in compute_dtype, for the MFU
    trackers: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], OPERATIONAL] = ["tensorboard"]
    placement: Annotated[Placement, OPERATIONAL] = Placement()

    @field_validator("num_workers", mode="before")
    @classmethod
    def _a_lone_number(cls, value: object) -> object:
        # The command line's parser makes a list of each value of a field that may be one.
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    @model_validator(mode="after")
    def _is_consistent(self) -> "TrainConfig":
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(f"num_workers is [min, max], and {self.num_workers[0]} is above {self.num_workers[1]}")
        return self

    @property
    def workers(self) -> tuple[int, int]:
        """The fewest and the most workers to train on."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)


class EvaluateConfig(Strict):
    """Loss on held-out and reference answers, and both models' responses, before and after training."""

    instructions: Annotated[str | None, OPERATIONAL] = None  # a path; None: the 60 of the package
    num_instructions: PositiveInt | None = None  # None: all of them
    max_new_tokens: PositiveInt = 256
    batch_size: Annotated[PositiveInt, OPERATIONAL] = 16
    placement: Annotated[Placement, OPERATIONAL] = Placement()


class PipelineConfig(Strict):
    """How jobs/pipeline.py submits the stages."""

    max_attempts: PositiveInt = 3  # of a stage that loses its driver or nodes; each goes on where the last one ended
    drivers: dict[Literal["generate", "train", "evaluate"], Placement] = {}  # of those not named: on the head


class RunConfig(Strict):
    """A whole run: `<storage_path>/<name>/` holds what its stages make."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    storage_path: Annotated[str, OPERATIONAL] = "runs"  # a directory, or a URI that pyarrow opens
    generate: GenerateConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    pipeline: Annotated[PipelineConfig, OPERATIONAL] = PipelineConfig()


class AdmissionConfig(Strict):
    """Who may ask the server for how much. Limits per minute stand with each key."""

    key_file: str | None = None  # lines of `alpaca-ray keys make`; None: those of keys_env, else only this machine asks
    keys_env: str = "ALPACA_RAY_API_KEYS"  # the variable's name; it holds the same lines, never a key
    max_in_flight: PositiveInt | None = None  # requests at once; None: as many as the engine replicas take
    max_waiting: Annotated[int, Field(ge=0)] = 64  # requests for their turn; one more is refused (429)
    max_wait_s: PositiveFloat = 30.0  # for that turn
    max_body_bytes: PositiveInt = 1_048_576
    body_timeout_s: PositiveFloat = 30.0  # from a request's headers to the end of its body
    request_timeout_s: PositiveFloat = 600.0  # from a request's headers to the end of its answer
    cors_origins: list[str] = []  # web pages that may ask, https://host; none by default
    log_prompts: bool = False  # request bodies in the access log


class WatermarkConfig(Strict):
    """The mark on every token that is served. No request can ask for less; the key's value stands in no config."""

    enabled: bool = True  # false: for a teacher whose answers are trained on
    key_env: str = "ALPACA_RAY_WATERMARK_KEY"  # the variable's name, on the nodes of the engine
    key_file: str | None = None  # a file that holds the key, in place of the variable
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.25  # share of the vocabulary that is green
    delta: PositiveFloat = 2.0  # what green logits gain
    allow_public_key: bool = False


class ModerationConfig(Strict):
    """Who judges every prompt and every sentence of an answer, the best first; without a verdict nothing passes."""

    backends: Annotated[list[Literal["openai", "local"]], Field(min_length=1)] = ["local"]
    policy: Literal["first", "both"] = "first"  # both: all are asked, and one that flags is enough
    key_env: str = "OPENAI_API_KEY"  # the variable's name, on the node of the ingress
    base_url: str | None = None  # None: OPENAI_BASE_URL, else OpenAI's own
    model: str = "omni-moderation-latest"
    timeout_s: PositiveFloat = 2.0


class AutoscalingConfig(Strict):
    """How many engine replicas there are, by the requests in hand. Names and meaning are Ray Serve's."""

    min_replicas: Annotated[int, Field(ge=0)] = 1  # 0: none while nobody asks; the first request waits for one
    max_replicas: PositiveInt
    initial_replicas: Annotated[int | None, Field(ge=0)] = None  # None: min_replicas
    target_ongoing_requests: PositiveFloat | None = None  # of each replica; None: max_batch_size, a full batch
    upscale_delay_s: Annotated[float, Field(ge=0)] = 30.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 600.0
    downscale_to_zero_delay_s: Annotated[float | None, Field(ge=0)] = None  # of the last one; None: downscale_delay_s
    look_back_period_s: PositiveFloat = 30.0  # that the requests in hand are averaged over

    @model_validator(mode="after")
    def _is_a_range(self) -> "AutoscalingConfig":
        initial = self.min_replicas if self.initial_replicas is None else self.initial_replicas
        if not self.min_replicas <= initial <= self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) may not be above initial_replicas ({initial}), "
                f"nor that above max_replicas ({self.max_replicas})"
            )
        return self


class ServeArgs(Strict):
    """The `args` of the application in serve_config.yaml."""

    model: str
    model_name: str | None = None  # the id that clients use; None: the last part of `model`
    prompt_format: Literal["chat_template", "plain"] = "chat_template"
    engine: Literal["torch", "vllm"] = "torch"  # vllm: the extra of that name, for GPUs
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization: Quantization | None = None  # of the linear layers' weights, on x86 CPUs, with dtype float32
    max_length: PositiveInt = 2048  # prompt and completion together, in tokens
    max_batch_size: PositiveInt = 16
    num_replicas: PositiveInt = 1
    autoscaling: AutoscalingConfig | None = None  # in place of num_replicas
    admission: AdmissionConfig = AdmissionConfig()
    watermark: WatermarkConfig = WatermarkConfig()
    moderation: ModerationConfig = ModerationConfig()
    placement: Placement = Placement()

    @model_validator(mode="after")
    def _counts_replicas_once(self) -> "ServeArgs":
        if self.autoscaling is not None and self.num_replicas != 1:
            raise ValueError("give num_replicas or autoscaling, not both: with autoscaling, num_replicas stays at 1")
        return self

    @model_validator(mode="after")
    def _quantizes_where_it_can(self) -> "ServeArgs":
        if self.quantization and (self.engine != "torch" or self.dtype != "float32" or self.placement.num_gpus > 0):
            raise ValueError(
                f"quantization: {self.quantization} is for engine: torch, dtype: float32, placement.num_gpus: 0; "
                "vLLM serves models that were quantized before, without it"
            )
        return self

    @property
    def max_replicas(self) -> int:
        """The most engine replicas that there will be."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.max_replicas


def explain(error: ValidationError, where: str, model: type[BaseModel] = RunConfig) -> str:
    """One line per wrong field: where it stands, its dotted name, what is wrong, the nearest valid name."""
    return "\n".join(f"{where}: {_explain_one(dict(item), model)}" for item in error.errors())


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields, those of nested models included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from field_names(field.annotation, f"{prefix}{name}.")


def result_fields(config: BaseModel) -> dict[str, Any]:
    """The values that decide what a stage makes: all but the operational ones."""
    result: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        if OPERATIONAL not in field.metadata:
            value = getattr(config, name)
            result[name] = result_fields(value) if isinstance(value, BaseModel) else value
    return result


def config_hash(config: BaseModel) -> str:
    """SHA-256 over the result fields in canonical JSON, first 16 hexadecimal digits."""
    canonical = json.dumps(result_fields(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def nearest(name: str, valid: Iterator[str] | Sequence[str]) -> str:
    """A clause that names the nearest valid name, or "" where none is near."""
    matches = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _explain_one(item: dict[str, Any], model: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"]]
    dotted = ".".join(location)
    if item["type"] != "extra_forbidden":
        given = "" if item["type"] in ("missing", "value_error") else f" (given: {item['input']!r})"
        return f"{dotted}: {item['msg']}{given}"
    siblings = [n for n in field_names(model) if n.split(".")[:-1] == location[:-1]]
    return f"{dotted}: no such field{nearest(dotted, siblings)}"
