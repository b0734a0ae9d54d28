"""Recipes, files, environment and command line merged into one RunConfig.

Precedence, strongest first: command line, environment (`ALPACA_RAY__TRAIN__SEED=1`), recipe or config file.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from alpaca_ray.config import ConfigError, RunConfig, explain, field_names, nearest

ENV_PREFIX = "ALPACA_RAY__"


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


def _explain_option(message: str) -> str:
    found = re.search(r"unrecognized arguments: (--\S+)", message)
    if found is None:
        return message
    option = found[1].split("=")[0]
    options = ["--" + name.replace("_", "-") for name in field_names(RunConfig)]
    return f"unknown option {option}{nearest(option, options)}"
