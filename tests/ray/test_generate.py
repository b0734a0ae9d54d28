"""The generation stage on a real Ray cluster, against the referee: a strict provider as a process of its own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alpaca_ray.artifacts import RunDirectory, Stage, begin_stage, open_run
from alpaca_ray.config import GenerateConfig, UserError
from alpaca_ray.generate import dataset
from alpaca_ray.provider.pool import block_rows
from alpaca_ray.settings import load_config
from tests.referee.process import RefereeProcess

KEPT = 20
PRICE = '{"input_usd_per_million": 1.5, "output_usd_per_million": 2.0}'  # the referee's


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RefereeProcess]:
    ledger = tmp_path_factory.mktemp("referee") / "ledger.jsonl"
    with RefereeProcess(ledger=str(ledger), answers={"num_tasks": [3, 4]}) as referee:
        yield referee


@pytest.fixture
def referee(process: RefereeProcess) -> RefereeProcess:
    process.configure(faults=[])
    process.reset()
    return process


def stage(referee: RefereeProcess, storage: Path, *overrides: str) -> Stage:
    config = load_config(
        ["--recipe", "tiny_cpu", "--storage-path", str(storage), "--generate.num-instructions", str(KEPT),
         "--generate.requests-per-round", "8", "--generate.num-actors", "1",
         "--generate.concurrent-requests-per-actor", "2", "--generate.teacher.price", PRICE,
         "--generate.teacher.model", "referee", "--generate.teacher.base-url", referee.base_url,
         "--generate.teacher.max-attempts", "1", "--generate.teacher.timeout-s", "30", *overrides]
    )  # fmt: skip
    run = open_run(config.storage_path, config.name)
    return begin_stage(run, config, "generate", dataset.inputs(config.generate))


def done(referee: RefereeProcess, storage: Path, *overrides: str) -> Stage:
    finished = stage(referee, storage, *overrides)
    dataset.generate(finished)
    return finished


@pytest.fixture(scope="module")
def undisturbed(process: RefereeProcess, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A run that nothing stopped or changed."""
    return done(process, tmp_path_factory.mktemp("undisturbed"))


def paid(referee: RefereeProcess) -> list[dict[str, Any]]:
    """The ledger without the questions for the list of models."""
    return [entry for entry in referee.ledger() if entry["method"] == "POST"]


def outputs(finished: Stage) -> dict[str, str]:
    assert finished.manifest is not None
    hashes: dict[str, str] = finished.manifest["outputs"]
    return hashes


def rows(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = run.read_table(f"generate/{name}").to_pylist()
    return result


@pytest.mark.parametrize("num_requests", [1, 8, 512, 6000])
@pytest.mark.parametrize("num_actors", [1, 8, 50])
@pytest.mark.parametrize("concurrent", [1, 8, 64])
def test_three_blocks_keep_an_actor_busy_and_a_long_round_has_some_for_each(
    num_requests: int, num_actors: int, concurrent: int
) -> None:
    config = GenerateConfig(num_instructions=1, num_actors=num_actors, concurrent_requests_per_actor=concurrent)
    rows = block_rows(num_requests, config)
    assert 3 * rows >= concurrent
    if num_requests >= 4 * num_actors * concurrent:
        assert num_requests / rows >= 2 * num_actors


def test_a_run_keeps_what_is_asked_for_and_leaves_its_papers(referee: RefereeProcess, tmp_path: Path) -> None:
    first = done(referee, tmp_path)
    run = first.run
    kept, rejects = rows(run, "dataset.parquet"), rows(run, "rejects.parquet")
    assert len(kept) == KEPT
    assert [(row["request"], row["position"]) for row in kept] == sorted((r["request"], r["position"]) for r in kept)
    assert all(row["model"] == "referee" and row["prompt_version"].startswith("alpaca-") for row in kept)
    assert all(len(row["seed_tasks"]) == 3 and len(row["most_similar"]) == 10 for row in kept)
    assert all(row["text"] and row["reason"] for row in rejects)
    alpaca_data = json.loads(run.read_bytes("generate/alpaca_data.json"))
    assert alpaca_data == [{key: row[key] for key in ("instruction", "input", "output")} for row in kept]
    assert run.read_bytes("generate/report.html").startswith(b"<!")
    assert b"# " in run.read_bytes("generate/datasheet.md")
    assert run.read_json("generate/croissant.json")["@type"]
    assert first.manifest is not None
    counts = first.manifest["counts"]
    ledger = paid(referee)
    assert counts["usd"] == pytest.approx(sum(entry["usd"] for entry in ledger), abs=1e-6)
    assert counts["prompt_tokens"] == sum(entry["prompt_tokens"] for entry in ledger)
    assert counts["repaid"] == 0

    again = stage(referee, tmp_path)
    assert again.manifest is not None
    assert again.manifest["counts"]["kept"] == KEPT
    assert len(paid(referee)) == len(ledger)


@pytest.mark.parametrize("style", ["chat", "json"])
def test_chat_models_give_a_dataset_too(referee: RefereeProcess, tmp_path: Path, style: str) -> None:
    finished = done(referee, tmp_path, "--generate.prompt-style", style)
    kept = rows(finished.run, "dataset.parquet")
    assert len(kept) == KEPT
    assert {row["prompt_version"].split("-")[0] for row in kept} == {style}
    assert {entry["route"] for entry in paid(referee)} == {"/v1/chat/completions"}


def test_batches_give_the_same_dataset_at_half_the_price(
    undisturbed: Stage, referee: RefereeProcess, tmp_path: Path
) -> None:
    referee.configure(batches={"polls_per_step": 0})  # done when it is first asked about, so that nothing waits
    batched = done(referee, tmp_path / "batched", "--generate.mode", "batch")
    ledger = referee.ledger()
    assert all(entry["batch"] for entry in ledger if "completions" in entry["route"])
    assert outputs(batched) == outputs(undisturbed)
    assert batched.manifest is not None
    assert undisturbed.manifest is not None
    assert batched.manifest["counts"]["repaid"] == 0
    assert batched.manifest["counts"]["usd"] == pytest.approx(sum(entry["usd"] for entry in ledger), abs=1e-6)
    assert batched.manifest["counts"]["usd"] == pytest.approx(undisturbed.manifest["counts"]["usd"] / 2, abs=1e-6)


@pytest.mark.parametrize("num_actors", [2, 5])
def test_the_dataset_does_not_depend_on_the_number_of_actors(
    undisturbed: Stage, referee: RefereeProcess, tmp_path: Path, num_actors: int
) -> None:
    assert undisturbed.config.generate.num_actors == 1
    many = done(referee, tmp_path, "--generate.num-actors", str(num_actors))
    assert outputs(many)["dataset.parquet"] == outputs(undisturbed)["dataset.parquet"]


def test_a_stopped_run_goes_on_and_pays_only_for_what_is_missing(
    undisturbed: Stage, referee: RefereeProcess, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"kept \d+ of 20 instructions after 3 requests.*max_requests"):
        done(referee, tmp_path, "--generate.max-requests", "3")
    assert len(paid(referee)) == 3
    assert rows(open_run(str(tmp_path), "tiny_cpu"), "rejects.parquet") is not None
    resumed = done(referee, tmp_path)
    assert referee.summary()["duplicates"] == {}
    # Rounds are planned from the yield so far, and what was planned stands: another plan, the same rows.
    assert outputs(resumed) == outputs(undisturbed)


def test_what_the_journal_has_is_not_paid_for_again(referee: RefereeProcess, tmp_path: Path) -> None:
    """The state after a kill just before a round was written down: its answers are in the journal alone."""
    first = done(referee, tmp_path)
    asked = len(paid(referee))
    first.run.delete("generate/completions")
    first.run.fs.delete_file(first.run.path("generate/manifest.json"))
    again = done(referee, tmp_path)
    assert outputs(again) == outputs(first)
    assert len(paid(referee)) == asked


def test_a_spent_budget_stops_the_run_and_a_higher_one_goes_on(
    undisturbed: Stage, referee: RefereeProcess, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"the budget is spent: generate.budget.max_usd=0.004"):
        done(referee, tmp_path, "--generate.budget.max-usd", "0.004")
    assert sum(entry["usd"] for entry in paid(referee)) <= 0.004
    finished = done(referee, tmp_path, "--generate.budget.max-usd", "1")
    assert referee.summary()["duplicates"] == {}
    assert outputs(finished) == outputs(undisturbed)


def test_a_dry_run_pays_for_a_pilot_that_the_run_then_has(referee: RefereeProcess, tmp_path: Path) -> None:
    asked_for = stage(referee, tmp_path)
    estimate = dataset.dry_run(asked_for)
    assert len(paid(referee)) == dataset.PILOT_REQUESTS
    done(referee, tmp_path)
    needed = len(paid(referee))
    assert estimate.requests.low <= needed <= estimate.requests.high + dataset.PILOT_REQUESTS
    assert referee.summary()["duplicates"] == {}


def test_a_few_failures_are_recorded_and_the_run_goes_on(referee: RefereeProcess, tmp_path: Path) -> None:
    referee.configure(faults=[{"kind": "server_error", "first": 1}])
    finished = done(referee, tmp_path)
    assert finished.manifest is not None
    assert finished.manifest["counts"]["failed"] == 1
    assert finished.manifest["counts"]["kept"] == KEPT


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("insufficient_quota", r"the teacher refuses \(insufficient_quota\)"),
        ("unauthorized", r"the teacher refuses \(authentication\)"),
        ("server_error", r"max_failed_share"),
    ],
)
def test_a_teacher_that_refuses_stops_the_run(
    referee: RefereeProcess, tmp_path: Path, fault: str, message: str
) -> None:
    referee.configure(faults=[{"kind": fault, "every": 1}])
    with pytest.raises(UserError, match=message):
        done(referee, tmp_path)
    assert len(paid(referee)) <= 8  # one round, and no more
    referee.configure(faults=[])
    mended = done(referee, tmp_path)
    assert mended.manifest is not None
    assert mended.manifest["counts"]["failed"] == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("--generate.teacher.model", "refere"), "generate.teacher.model: .* has no model 'refere'; it has: .*referee"),
        (("--generate.teacher.base-url", "http://127.0.0.1:9/v1"), "http://127.0.0.1:9/v1/ cannot be reached"),
        (("--generate.teacher.api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY is not set: export the key"),
        (("--generate.skip-filters", '["too_shrt"]'), "generate.skip_filters.*did you mean 'too_short'"),
        (("--generate.budget.max-usd", "1", "--generate.teacher.price", "null"), "generate.teacher.price"),
    ],
)
def test_a_bad_setting_stops_before_any_request(
    referee: RefereeProcess, tmp_path: Path, override: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        done(referee, tmp_path, *override)
    assert not paid(referee)


def test_a_refused_key_stops_before_any_request(
    referee: RefereeProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "bad-key")
    with pytest.raises(UserError, match=r"refused \(authentication\)"):
        done(referee, tmp_path)
    assert not paid(referee)
