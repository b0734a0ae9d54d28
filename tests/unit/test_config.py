"""Configs: strict, frozen, merged in one order, and hashed over what decides the result."""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from alpaca_ray.config import ConfigError, RunConfig, config_hash, field_names, result_fields
from alpaca_ray.settings import load_config, recipe_names

TINY = ("--recipe", "tiny_cpu")
MINIMAL = "name: mine\ngenerate: {num_instructions: 3}\ntrain: {base_model: some/model}\n"

# Another value for every field. Those of RESULT decide what a stage makes; those of OPERATIONAL only where or how fast.
RESULT: dict[str, Any] = {
    "name": "other",
    "generate.seed": 1,
    "generate.num_instructions": 41,
    "generate.num_examples_per_prompt": 2,
    "generate.num_tasks_per_prompt": 9,
    "generate.novelty_threshold": 0.6,
    "generate.requests_per_round": 17,
    "generate.teacher.model": "another",
    "generate.teacher.max_tokens": 401,
    "generate.prompt_style": "chat",
    "generate.skip_filters": ["too_short"],
    "generate.similarity": False,
    "generate.teacher.temperature": 0.0,
    "generate.teacher.top_p": 0.9,
    "train.base_model": "other/model",
    "train.seed": 1,
    "train.heldout_fraction": 0.1,
    "train.max_length": 385,
    "train.num_epochs": 5,
    "train.global_batch_size": 16,
    "train.micro_batch_size": 2,
    "train.learning_rate": 3e-5,
    "train.warmup_ratio": 0.0,
    "train.weight_decay": 0.1,
    "train.max_grad_norm": 2.0,
    "train.packing": False,
    "train.loss_normalization": "micro_batch",
    "train.lora": {"rank": 8, "alpha": 16.0, "target_modules": ["q_proj"]},
    "train.strategy": "deepspeed",
    "train.zero_stage": 2,
    "train.compute_dtype": "float32",
    "train.export_dtype": "bfloat16",
    "evaluate.num_instructions": 21,
    "evaluate.max_new_tokens": 65,
}
OPERATIONAL: dict[str, Any] = {
    "storage_path": "elsewhere",
    "generate.seed_tasks": "seeds.jsonl",
    "generate.max_requests": 401,
    "generate.max_failed_share": 0.0,
    "generate.num_actors": 3,
    "generate.concurrent_requests_per_actor": 1,
    "generate.teacher.base_url": "http://localhost:8000/v1",
    "generate.teacher.api_key_env": "OTHER_KEY",
    "generate.teacher.timeout_s": 1.5,
    "generate.teacher.max_attempts": 1,
    "generate.teacher.max_wait_s": 60.0,
    "generate.teacher.verify_model": False,
    "generate.teacher.price": {"input_usd_per_million": 1.0, "output_usd_per_million": 2.0},
    "generate.evaluation_tasks": "evaluation.jsonl",
    "generate.limits.requests_per_minute": 10,
    "generate.limits.tokens_per_minute": 100,
    "generate.limits.window_s": 6.0,
    "generate.budget.max_usd": 1.5,
    "generate.budget.max_tokens": 1000,
    "generate.mode": "batch",
    "generate.placement.num_cpus": 0,
    "generate.placement.num_gpus": 0.5,
    "generate.placement.label_selector": {"zone": "a"},
    "train.checkpoint_every_steps": 5,
    "train.max_failures": -1,
    "train.num_workers": (2, 4),
    "train.cpu_offload": True,
    "train.activation_checkpointing": True,
    "train.compile": True,
    "train.checkpoint_async": False,
    "train.checkpoints_to_keep": 3,
    "train.evaluate_every_steps": 7,
    "train.keep_best": True,
    "train.start_timeout_s": 30.0,
    "train.peak_tflops": 312.0,
    "train.trackers": ["mlflow"],
    "train.placement.num_cpus": 3,
    "train.placement.num_gpus": 1,
    "train.placement.label_selector": {"zone": "a"},
    "evaluate.instructions": "mine.jsonl",
    "evaluate.batch_size": 1,
    "evaluate.placement.num_cpus": 3,
    "evaluate.placement.num_gpus": 1,
    "evaluate.placement.label_selector": {"zone": "a"},
    "pipeline.max_attempts": 7,
    "pipeline.drivers": {"generate": {"num_cpus": 2, "num_gpus": 0, "label_selector": {}}},
}


OTHER = RESULT | OPERATIONAL


@pytest.fixture(autouse=True)
def no_overrides_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.upper().startswith("ALPACA_RAY__")]:
        monkeypatch.delenv(variable)


@pytest.fixture(scope="module")
def defaults() -> RunConfig:
    return RunConfig.model_validate(yaml.safe_load(MINIMAL))


def value_of(config: BaseModel, dotted: str) -> Any:
    value: Any = functools.reduce(getattr, dotted.split("."), config)
    return {name: plain(each) for name, each in value.items()} if isinstance(value, dict) else plain(value)


def plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


def changed(config: RunConfig, dotted: str, value: Any) -> RunConfig:
    values = config.model_dump()
    *parents, last = dotted.split(".")
    functools.reduce(lambda place, key: place[key], parents, values)[last] = value
    return RunConfig.model_validate(values)


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}"""
    tree: dict[str, Any] = {}
    for dotted, value in values.items():
        *parents, last = dotted.split(".")
        functools.reduce(lambda place, key: place.setdefault(key, {}), parents, tree)[last] = value
    return tree


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_loads_and_is_named_as_its_file(recipe: str) -> None:
    assert load_config(["--recipe", recipe]).name == recipe


def test_alpaca_7b_holds_the_published_hyperparameters() -> None:
    train = load_config(["--recipe", "alpaca_7b"]).train
    published = {"num_epochs": 3, "learning_rate": 2e-5, "global_batch_size": 128, "max_length": 512}
    published |= {"weight_decay": 0.0, "warmup_ratio": 0.03}
    assert {name: getattr(train, name) for name in published} == published


def test_the_command_line_beats_the_environment_and_that_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file_only = load_config(TINY)
    assert (file_only.generate.max_requests, file_only.generate.num_actors) == (400, 2)

    monkeypatch.setenv("ALPACA_RAY__GENERATE__MAX_REQUESTS", "11")
    monkeypatch.setenv("ALPACA_RAY__GENERATE__NUM_ACTORS", "12")
    monkeypatch.setenv("ALPACA_RAY__GENERATE__TEACHER__MAX_ATTEMPTS", "1")
    config = load_config([*TINY, "--generate.num-actors", "13"])
    assert config.generate.num_actors == 13
    assert config.generate.max_requests == 11
    assert config.generate.teacher.max_attempts == 1
    assert config.generate.teacher.max_tokens == 400  # the neighbours of an overridden field stay as the file has them


def test_every_field_can_be_set_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(nested(OTHER)))
    config = load_config(["--config", str(path)])
    assert {dotted: value_of(config, dotted) for dotted in OTHER} == OTHER


def test_every_field_can_be_set_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for dotted, value in OTHER.items():
        monkeypatch.setenv("ALPACA_RAY__" + dotted.replace(".", "__").upper(), as_text(value))
    config = load_config(TINY)
    assert {dotted: value_of(config, dotted) for dotted in OTHER} == OTHER


def test_null_in_the_environment_or_on_the_command_line_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config(TINY).evaluate.num_instructions is not None
    assert load_config([*TINY, "--evaluate.num-instructions=null"]).evaluate.num_instructions is None
    monkeypatch.setenv("ALPACA_RAY__EVALUATE__NUM_INSTRUCTIONS", "null")
    assert load_config(TINY).evaluate.num_instructions is None


def test_every_field_can_be_set_on_the_command_line() -> None:
    options = [f"--{dotted.replace('_', '-')}={as_text(value)}" for dotted, value in OTHER.items()]
    config = load_config([*TINY, *options])
    assert {dotted: value_of(config, dotted) for dotted in OTHER} == OTHER


def test_the_order_of_fields_in_a_file_does_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    reordered = write(
        tmp_path / "..", "train:\n  base_model: some/model\ngenerate:\n  num_instructions: 3\nname: mine\n"
    )
    first, second = (load_config(["--config", str(p)]) for p in (path, reordered))
    assert first == second
    assert config_hash(first) == config_hash(second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "tiny_cup"], r"unknown recipe 'tiny_cup'; did you mean 'tiny_cpu'\?.*alpaca_7b"),
        (["--recipe", "../tiny_cpu"], r"unknown recipe '\.\./tiny_cpu'"),
        ([*TINY, "--generate.num-instruction", "7"], "--generate.num-instruction; .*'--generate.num-instructions'"),
        ([*TINY, "--generate.num_instructions", "7"], "--generate.num_instructions; .*'--generate.num-instructions'"),
        ([*TINY, "--train.sed=7"], r"unknown option --train\.sed; did you mean '--train\.seed'\?"),
        ([*TINY, "--nam", "x"], r"unknown option --nam; did you mean '--name'\?"),
        ([*TINY, "64"], "64"),
        ([*TINY, "--train.seed"], "--train.seed"),
        (["--recipe"], "--recipe"),
        ([], "give either --recipe NAME .*tiny_cpu.* or --config FILE"),
        ([*TINY, "--config", "run.yaml"], "give either --recipe NAME .* or --config FILE"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_nearest_valid_name(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(arguments)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("ALPACA_RAY__TRAIN__SEDE", "ALPACA_RAY__TRAIN__SEED"),
        ("ALPACA_RAY__GENERATE__TEACHER__MODLE", "ALPACA_RAY__GENERATE__TEACHER__MODEL"),
        ("ALPACA_RAY__NUM_EPOCHS", "ALPACA_RAY__TRAIN__NUM_EPOCHS"),
    ],
)
def test_an_unknown_environment_variable_is_refused(variable: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError, match=rf"environment variable {variable} names no field; did you mean '{meant}'"):
        load_config(TINY)


def test_variables_of_others_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPACA_RAY_CACHE", "/somewhere")
    monkeypatch.setenv("NAME", "not the run's")
    monkeypatch.setenv("TRAIN__SEED", "5")
    config = load_config(TINY)
    assert (config.name, config.train.seed) == ("tiny_cpu", 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "nmae: x\n", "nmae: no such field; did you mean 'name'"),
        (MINIMAL.replace("{num", "{seeed: 1, num"), "generate.seeed: no such field; did you mean 'generate.seed'"),
        (
            MINIMAL.replace("{num", "{teacher: {modle: x}, num"),
            "generate.teacher.modle: no such field; did you mean 'generate.teacher.model'",
        ),
        (MINIMAL.replace("num_instructions: 3", ""), "generate.num_instructions: Field required"),
        (MINIMAL.replace("3", "many"), r"generate\.num_instructions: .*integer.*\(given: 'many'\)"),
        (MINIMAL.replace("3", "0"), r"generate\.num_instructions: .*greater than 0.*\(given: 0\)"),
        (MINIMAL.replace("some/model", "[a]"), r"train\.base_model: .*string.*\(given: \['a'\]\)"),
        (MINIMAL.replace("mine", "a/b"), r"name: .*\(given: 'a/b'\)"),
        (MINIMAL.replace("{num_instructions: 3}", "3"), r"generate: .*\(given: 3\)"),
        (MINIMAL.replace("{num_instructions: 3}", ""), r"generate: .*\(given: None\)"),
    ],
)
def test_a_wrong_field_in_a_file_is_named_with_file_and_value(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"config file {re.escape(str(path))}: {message}"):
        load_config(["--config", str(path)])


def test_all_wrong_fields_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "name: 3\ngenerate: {}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(path)])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for field in ("name", "generate.num_instructions", "train"):
        assert any(f": {field}: " in line for line in lines), field


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "is not valid YAML"),
        (b"name: a\x00", "is not valid YAML"),
        (b"name: caf\xe9\n", "UTF-8"),
        ("- name", "must hold a mapping of fields, not list"),
        ("", "must hold a mapping of fields, not NoneType"),
        (MINIMAL + "7: x\n", "7"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(["--config", str(path)])
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=f"config file {re.escape(str(path))} does not exist"):
            load_config(["--config", str(path)])


@pytest.mark.parametrize(
    ("option", "value"),
    [("--train.seed", "x"), ("--train.learning-rate", "nan"), ("--train.compute-dtype", "float16")],
)
def test_a_wrong_value_on_the_command_line_names_field_and_value(option: str, value: str) -> None:
    field = option.removeprefix("--").replace("-", "_")
    with pytest.raises(ConfigError, match=rf"{re.escape(field)}: .*\(given: '{value}'\)"):
        load_config([*TINY, option, value])


def test_a_wrong_value_in_the_environment_names_field_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPACA_RAY__TRAIN__SEED", "x")
    with pytest.raises(ConfigError, match=r"train\.seed: .*\(given: 'x'\)"):
        load_config(TINY)


def test_configs_are_frozen(defaults: RunConfig) -> None:
    for target, name in ((defaults, "name"), (defaults.train, "seed"), (defaults.generate.teacher, "model")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, name, getattr(target, name))


def test_a_config_survives_json() -> None:
    config = load_config(["--recipe", "alpaca_7b"])
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_every_field_is_a_result_or_an_operational_one() -> None:
    names = set(field_names(RunConfig))
    leaves = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
    assert not RESULT.keys() & OPERATIONAL.keys()
    assert RESULT.keys() | OPERATIONAL.keys() == leaves


@pytest.mark.parametrize("dotted", RESULT)
def test_a_result_field_changes_the_hash(defaults: RunConfig, dotted: str) -> None:
    other = changed(defaults, dotted, RESULT[dotted])
    assert value_of(other, dotted) != value_of(defaults, dotted)
    assert config_hash(other) != config_hash(defaults)


@pytest.mark.parametrize("dotted", OPERATIONAL)
def test_an_operational_field_does_not_change_the_hash(defaults: RunConfig, dotted: str) -> None:
    other = changed(defaults, dotted, OPERATIONAL[dotted])
    assert value_of(other, dotted) != value_of(defaults, dotted)
    assert config_hash(other) == config_hash(defaults)
    assert result_fields(other) == result_fields(defaults)


@pytest.mark.parametrize("arguments", [["--help"], [*TINY, "-h"], ["--help", *TINY, "--train.seed", "1"]])
def test_help_lists_every_field(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        load_config(arguments)
    assert exit_.value.code == 0
    shown = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
    assert shown >= {"--" + name.replace("_", "-") for name in [*RESULT, *OPERATIONAL]}
    assert {"--recipe", "--config"} <= shown


def test_a_prompt_must_leave_room_for_new_tasks() -> None:
    with pytest.raises(ConfigError, match="num_tasks_per_prompt must be above num_examples_per_prompt"):
        load_config(["--recipe", "tiny_cpu", "--generate.num-tasks-per-prompt", "3"])
