"""One frozen, strict config per stage; recipes, files, environment and command line are merged into it.

Precedence, strongest first: command line, environment (`ALPACA_RAY__TRAIN__SEED=1`), recipe or config file.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

ENV_PREFIX = "ALPACA_RAY__"
STAGES = ("generate", "train", "evaluate")

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


class TrainConfig(Strict):
    """Supervised fine-tuning with Alpaca's recipe; the published 7B values are in `recipes/alpaca_7b.yaml`."""

    base_model: str
    seed: int = 0
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    max_length: PositiveInt = 512
    num_epochs: PositiveInt = 3
    global_batch_size: PositiveInt = 128
    micro_batch_size: PositiveInt = 4
    learning_rate: PositiveFloat = 2e-5
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    export_dtype: Literal["bfloat16", "float32"] = "float32"
    checkpoint_every_steps: Annotated[PositiveInt, OPERATIONAL] = 100
    max_failures: Annotated[int, Field(ge=-1), OPERATIONAL] = 3
    num_workers: Annotated[PositiveInt, OPERATIONAL] = 1
    placement: Annotated[Placement, OPERATIONAL] = Placement()


class EvaluateConfig(Strict):
    """Loss on held-out and reference answers, and both models' responses, before and after training."""

    instructions: Annotated[str | None, OPERATIONAL] = None  # a path; None: the 60 of the package
    num_instructions: PositiveInt | None = None  # None: all of them
    max_new_tokens: PositiveInt = 256
    batch_size: Annotated[PositiveInt, OPERATIONAL] = 16
    placement: Annotated[Placement, OPERATIONAL] = Placement()


class RunConfig(Strict):
    """A whole run: `<storage_path>/<name>/` holds what its stages make."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    storage_path: Annotated[str, OPERATIONAL] = "runs"  # a directory, or a URI that pyarrow opens
    generate: GenerateConfig
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()


class ServeArgs(Strict):
    """The `args` of the application in serve_config.yaml."""

    model: str
    model_name: str | None = None  # the id that clients use; None: the last part of `model`
    prompt_format: Literal["chat_template", "plain"] = "chat_template"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_length: PositiveInt = 2048  # prompt and completion together, in tokens
    max_batch_size: PositiveInt = 16
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.02
    num_replicas: PositiveInt = 1
    placement: Placement = Placement()


def recipe_names() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipes().iterdir() if p.name.endswith(".yaml"))


def load_config(argv: Sequence[str]) -> RunConfig:
    """Merge `--recipe NAME` or `--config FILE`, the environment and dotted overrides into one RunConfig.

    Raises ConfigError that names the field and, for an unknown one, the nearest valid name.
    """
    chooser = argparse.ArgumentParser(prog="job", add_help=False, allow_abbrev=False, exit_on_error=False)
    chooser.add_argument("--recipe")
    chooser.add_argument("--config")
    try:
        chosen, overrides = chooser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None
    if {"-h", "--help"} & set(overrides):
        overrides = ["--help"]
    elif (chosen.recipe is None) == (chosen.config is None):
        raise ConfigError(f"give either --recipe NAME ({', '.join(recipe_names())}) or --config FILE")
    source = f"recipe {chosen.recipe}" if chosen.recipe is not None else f"config file {chosen.config}"
    values = {} if overrides == ["--help"] else _read_values(chosen.recipe, chosen.config)
    _refuse_unknown_environment(os.environ)
    changed = bool(overrides) or any(name.upper().startswith(ENV_PREFIX) for name in os.environ)
    return _merge(values, overrides, f"{source}, environment and options" if changed else source)


def _merge(values: dict[str, Any], overrides: list[str], where: str) -> RunConfig:
    class Settings(BaseSettings, RunConfig):
        model_config = SettingsConfigDict(frozen=True, extra="forbid")

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: Any, **__: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            command_line: PydanticBaseSettingsSource = CliSettingsSource(
                settings_cls,
                cli_prog_name="python jobs/STAGE.py (--recipe NAME | --config FILE)",
                cli_parse_args=overrides,
                cli_kebab_case=True,
                cli_exit_on_error=False,
            )
            environment = EnvSettingsSource(
                settings_cls, env_prefix=ENV_PREFIX, env_nested_delimiter="__", env_parse_none_str="null"
            )
            return command_line, environment, InitSettingsSource(settings_cls, init_kwargs=values)

    try:
        settings = Settings()
    except ValidationError as error:
        raise ConfigError(explain(error, where)) from None
    except SettingsError as error:
        raise ConfigError(_explain_option(str(error))) from None
    return RunConfig.model_validate(settings.model_dump())


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


def _recipes() -> Traversable:
    return resources.files("alpaca_ray") / "recipes"


def _read_values(recipe: str | None, config_file: str | None) -> dict[str, Any]:
    source: Traversable
    if recipe is not None:
        if recipe not in recipe_names():
            raise ConfigError(
                f"unknown recipe {recipe!r}{nearest(recipe, recipe_names())} (there are: {', '.join(recipe_names())})"
            )
        source = _recipes() / f"{recipe}.yaml"
    else:
        source = Path(str(config_file))
        if not source.is_file():
            raise ConfigError(f"config file {config_file} does not exist")
    try:
        values = yaml.safe_load(source.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {source} is not UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {source} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config file {source} must hold a mapping of fields, not {type(values).__name__}")
    if odd := [key for key in values if not isinstance(key, str)]:
        raise ConfigError(f"config file {source}: {odd[0]!r}: no such field")
    return values


def _refuse_unknown_environment(environ: Mapping[str, str]) -> None:
    valid = {ENV_PREFIX + name.replace(".", "__").upper(): name for name in field_names(RunConfig)}
    for variable in environ:
        if variable.upper().startswith(ENV_PREFIX) and variable.upper() not in valid:
            hint = nearest(variable.upper(), list(valid))
            raise ConfigError(f"environment variable {variable} names no field{hint}")


def _explain_one(item: dict[str, Any], model: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"]]
    dotted = ".".join(location)
    if item["type"] != "extra_forbidden":
        given = "" if item["type"] in ("missing", "value_error") else f" (given: {item['input']!r})"
        return f"{dotted}: {item['msg']}{given}"
    siblings = [n for n in field_names(model) if n.split(".")[:-1] == location[:-1]]
    return f"{dotted}: no such field{nearest(dotted, siblings)}"


def _explain_option(message: str) -> str:
    found = re.search(r"unrecognized arguments: (--\S+)", message)
    if found is None:
        return message
    option = found[1].split("=")[0]
    options = ["--" + name.replace("_", "-") for name in field_names(RunConfig)]
    return f"unknown option {option}{nearest(option, options)}"
