"""Request k is a pure function of the seed and k; rounds ask for enough and never for too much."""

import json
import os
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_ray.config import GenerateConfig
from alpaca_ray.generate.plan import plan_request, round_size
from alpaca_ray.prompts import generation_prompt
from alpaca_ray.schema import REQUEST_SCHEMA, read_seed_tasks

SEEDS = read_seed_tasks(None)
CONFIG = GenerateConfig(num_instructions=100)

indices = st.integers(0, 10**6)


def test_a_request_is_a_row_of_the_plan() -> None:
    row = plan_request(0, 7, SEEDS, CONFIG)
    assert list(row) == REQUEST_SCHEMA.names
    assert row["request"] == 7
    assert 0 <= row["seed"] < 2**31  # what the API takes


@settings(deadline=None, max_examples=25)
@given(st.integers(), st.lists(indices, min_size=1, max_size=4))
def test_a_request_is_the_same_alone_and_in_any_order(run_seed: int, order: list[int]) -> None:
    alone = {k: plan_request(run_seed, k, SEEDS, CONFIG) for k in sorted(order)}
    assert [plan_request(run_seed, k, SEEDS, CONFIG) for k in order] == [alone[k] for k in order]


ANOTHER_PROCESS = """
import json
from alpaca_ray.config import GenerateConfig
from alpaca_ray.generate.plan import plan_request
from alpaca_ray.schema import read_seed_tasks

seeds, config = read_seed_tasks(None), GenerateConfig(num_instructions=100)
print(json.dumps([plan_request(5, k, seeds, config) for k in range(20)]))
"""


def test_a_request_is_the_same_in_another_process() -> None:
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", ANOTHER_PROCESS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [plan_request(5, k, SEEDS, CONFIG) for k in range(20)]


def test_requests_and_runs_differ() -> None:
    seeds = {plan_request(run_seed, k, SEEDS, CONFIG)["seed"] for run_seed in range(10) for k in range(100)}
    assert len(seeds) > 995  # 1000 draws of 31 bits: a collision is a 1 in 4,000 chance
    prompts = {plan_request(0, k, SEEDS, CONFIG)["prompt"] for k in range(500)}
    assert len(prompts) > 495
    assert plan_request(1, 23, SEEDS, CONFIG) != plan_request(12, 3, SEEDS, CONFIG) | {"request": 23}


def test_a_prompt_shows_different_seed_tasks_drawn_from_all() -> None:
    drawn: set[str] = set()
    for k in range(1000):
        prompt = plan_request(0, k, SEEDS, CONFIG)["prompt"]
        shown = [line.split("Instruction: ")[1] for line in prompt.splitlines() if "Instruction: " in line]
        assert len(shown) == len(set(shown)) == CONFIG.num_examples_per_prompt
        drawn |= set(shown)
    assert len(drawn) == len(SEEDS)  # the chance that 3,000 draws miss one of 175: under 1e-5


def test_the_prompt_is_that_of_the_config() -> None:
    config = CONFIG.model_copy(update={"num_examples_per_prompt": len(SEEDS), "num_tasks_per_prompt": 200})
    prompt = plan_request(0, 0, SEEDS, config)["prompt"]
    assert prompt.partition("###")[0] == generation_prompt([], 200).partition("###")[0]
    assert prompt.endswith("\n###\n176. Instruction:")


@settings(deadline=None, max_examples=150)
@given(
    num_instructions=st.integers(1, 10**5),
    per_round=st.integers(1, 5000),
    max_requests=st.integers(1, 10**5),
    kept=st.integers(0, 10**6),
    asked=st.integers(0, 10**6),
)
def test_a_round_is_never_larger_than_allowed(
    num_instructions: int, per_round: int, max_requests: int, kept: int, asked: int
) -> None:
    config = GenerateConfig(num_instructions=num_instructions, requests_per_round=per_round, max_requests=max_requests)
    size = round_size(kept, asked, asked, config)
    assert 0 <= size <= per_round
    assert asked + size <= max(asked, max_requests)
    if kept < num_instructions and 0 < asked < max_requests:
        assert size >= 1  # a run that may go on does
    if kept >= num_instructions and asked > 0:
        assert size == 0


@settings(deadline=None, max_examples=100)
@given(kept=st.integers(1, 999), answered=st.integers(1, 1000))
def test_a_round_asks_for_a_tenth_more_than_the_yield_so_far_calls_for(kept: int, answered: int) -> None:
    config = GenerateConfig(num_instructions=1000, requests_per_round=10**9, max_requests=10**9)
    size = round_size(kept, answered, answered, config)
    expected_yield = size * kept / answered
    assert expected_yield >= 1000 - kept
    assert (size - 1) * kept / answered <= 1.1 * (1000 - kept)


def test_a_run_that_has_kept_nothing_asks_for_a_whole_round() -> None:
    config = GenerateConfig(num_instructions=10, requests_per_round=8, max_requests=20)
    assert [round_size(0, asked, asked, config) for asked in (0, 8, 16, 20, 24)] == [8, 8, 4, 0, 0]
