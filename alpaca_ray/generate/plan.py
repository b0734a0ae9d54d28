"""(run seed, request index) -> the request: pure, so that any request can be made again anywhere, at any time."""

import math
import random
from collections.abc import Sequence
from typing import Any

from alpaca_ray.config import GenerateConfig
from alpaca_ray.prompts import generation_prompt, response_format, stop_sequence
from alpaca_ray.provider.request import Request
from alpaca_ray.schema import SeedTask


def plan_request(run_seed: int, request: int, seed_tasks: Sequence[SeedTask], config: GenerateConfig) -> dict[str, Any]:
    """Request number `request` of a run, a row of REQUEST_SCHEMA.

    In-context examples are drawn from the seed tasks only, as Alpaca did (self-instruct mixed in generated ones): no
    request depends on another's answer.
    """
    rng = random.Random(f"{run_seed}/{request}")
    examples = rng.sample(list(seed_tasks), config.num_examples_per_prompt)
    prompt = generation_prompt(examples, config.num_tasks_per_prompt, config.prompt_style)
    seed_ids = [task.id for task in examples]
    return {"request": request, "prompt": prompt, "seed": rng.getrandbits(31), "seed_tasks": seed_ids}


def request_form(config: GenerateConfig) -> Request:
    """What all requests of a run have in common; prompt and seed are each one's own."""
    if config.prompt_style == "alpaca":
        return Request("", 0, stop=stop_sequence(config.num_tasks_per_prompt))
    if config.prompt_style == "chat":
        return Request("", 0, chat=True)
    schema = response_format(config.num_tasks_per_prompt - config.num_examples_per_prompt)
    return Request("", 0, chat=True, response_format=schema)


def round_size(kept: int, answered: int, asked: int, config: GenerateConfig) -> int:
    """How many requests the next round asks for, from the yield so far.

    A tenth more than the yield calls for, at most `requests_per_round` and what `max_requests` leaves. A run that
    has kept nothing yet asks for a whole round.
    """
    needed = config.requests_per_round
    if kept:
        needed = math.ceil(1.1 * (config.num_instructions - kept) * answered / kept)
    return max(0, min(needed, config.requests_per_round, config.max_requests - asked))
