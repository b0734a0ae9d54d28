"""The strict check of a recipe: names and types of RunConfig, and contradictions that a run would meet late."""

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from alpaca_ray import models
from alpaca_ray.config import ConfigError, RunConfig, UserError
from alpaca_ray.generate.filters import check_filter_names
from alpaca_ray.provider.budget import price_of
from alpaca_ray.yaml_lines import Check, Fields, Location, Problem, parse


def lint(text: str) -> list[Problem]:
    """All that is wrong with a recipe, by line."""
    fields = parse(text)
    return [fields] if isinstance(fields, Problem) else check(fields)


def check(fields: Fields) -> list[Problem]:
    """As `lint`, of a file that is read."""
    found = Check(fields)
    found.model(fields.values, RunConfig, ())
    config = read(fields.values)
    for path, message in () if config is None else _contradictions(config):
        found.say(path, message)
    return found.found()


def read(values: Any) -> RunConfig | None:
    """The config of a recipe; None where it is not valid."""
    try:
        return RunConfig.model_validate(values)
    except (ValidationError, ConfigError, TypeError):
        return None


def _contradictions(config: RunConfig) -> Iterator[tuple[Location, str]]:
    yield from _of_generation(config)
    train = config.train
    if train.strategy == "deepspeed" and train.compile:
        yield ("train", "compile"), "is not for strategy deepspeed: false, or strategy fsdp"
    if train.base_model.startswith("embedded:") and train.base_model != models.EMBEDDED:
        yield ("train", "base_model"), f"no such embedded model; did you mean {models.EMBEDDED!r}?"


def _of_generation(config: RunConfig) -> Iterator[tuple[Location, str]]:
    generate = config.generate
    for index, name in enumerate(generate.skip_filters):
        try:
            check_filter_names([name])
        except UserError as error:
            yield ("generate", "skip_filters", index), str(error).removeprefix("generate.skip_filters: ")
    most = generate.max_requests * (generate.num_tasks_per_prompt - generate.num_examples_per_prompt)
    if most < generate.num_instructions:
        message = f"so many requests bring {most} instructions at most, and {generate.num_instructions} are asked for"
        yield ("generate", "max_requests"), message
    limit = generate.limits.tokens_per_minute
    if limit is not None and generate.teacher.max_tokens > limit:
        message = (
            f"a request reserves teacher.max_tokens, {generate.teacher.max_tokens}, and {limit} are allowed a minute"
        )
        yield ("generate", "limits", "tokens_per_minute"), message
    if generate.budget.max_usd is not None and price_of(generate.teacher.model, generate.teacher.price) is None:
        message = "the price of this model is not known: give generate.teacher.price, or budget.max_tokens instead"
        yield ("generate", "budget", "max_usd"), message
