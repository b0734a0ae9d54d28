"""The generation stage on a real Ray cluster, against a real HTTP server with a scripted teacher."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alpaca_ray.artifacts import RunDirectory, Stage, begin_stage, open_run
from alpaca_ray.config import UserError, load_config
from alpaca_ray.generate import dataset
from tests.teacher import Teacher

KEPT = 20


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    with Teacher() as server:
        yield server
        server.shutdown()


def stage(teacher: Teacher, storage: Path, *overrides: str) -> Stage:
    config = load_config(
        ["--recipe", "tiny_cpu", "--storage-path", str(storage), "--generate.num-instructions", str(KEPT),
         "--generate.requests-per-round", "8", "--generate.num-actors", "1",
         "--generate.concurrent-requests-per-actor", "2",
         "--generate.teacher.model", "scripted", "--generate.teacher.base-url", teacher.base_url,
         "--generate.teacher.max-retries", "0", *overrides]
    )  # fmt: skip
    run = open_run(config.storage_path, config.name)
    return begin_stage(run, config, "generate", dataset.inputs(config.generate))


def rows(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = run.read_table(f"generate/{name}").to_pylist()
    return result


def test_a_run_keeps_what_is_asked_for_and_every_reject(teacher: Teacher, tmp_path: Path) -> None:
    first = stage(teacher, tmp_path)
    dataset.generate(first)

    kept, rejects = rows(first.run, "dataset.parquet"), rows(first.run, "rejects.parquet")
    assert len(kept) == KEPT
    assert [(row["request"], row["position"]) for row in kept] == sorted((r["request"], r["position"]) for r in kept)
    assert {row["reason"] for row in rejects} >= {"duplicate", "blocked_word", "no_output"}
    assert all(row["text"] for row in rejects)
    # Five tasks stand in every answer: each is in the dataset or among the rejects.
    assert len(kept) + len(rejects) == 5 * len(teacher.requests)
    alpaca_data = json.loads(first.run.read_bytes("generate/alpaca_data.json"))
    assert alpaca_data == [{key: row[key] for key in ("instruction", "input", "output")} for row in kept]

    asked = len(teacher.requests)
    again = stage(teacher, tmp_path)
    assert again.manifest is not None
    assert again.manifest["counts"]["kept"] == KEPT
    assert len(teacher.requests) == asked


def test_the_dataset_does_not_depend_on_the_number_of_actors(teacher: Teacher, tmp_path: Path) -> None:
    one = stage(teacher, tmp_path / "one", "--generate.num-actors", "1")
    three = stage(teacher, tmp_path / "three", "--generate.num-actors", "3")
    dataset.generate(one)
    dataset.generate(three)
    assert one.manifest is not None
    assert three.manifest is not None
    assert one.manifest["outputs"] == three.manifest["outputs"]


def test_a_stopped_run_goes_on_and_pays_only_for_what_is_missing(teacher: Teacher, tmp_path: Path) -> None:
    interrupted = stage(teacher, tmp_path, "--generate.max-requests", "8")
    with pytest.raises(UserError, match=r"kept \d+ of 20 instructions after 8 requests.*max_requests"):
        dataset.generate(interrupted)
    assert len(teacher.requests) == 8
    assert {row["reason"] for row in rows(interrupted.run, "rejects.parquet")} >= {"duplicate", "no_output"}

    resumed = stage(teacher, tmp_path)
    dataset.generate(resumed)
    seeds = [request["seed"] for request in teacher.requests]
    assert len(seeds) == len(set(seeds))  # nothing was asked twice

    undisturbed = stage(teacher, tmp_path / "undisturbed")
    dataset.generate(undisturbed)
    assert resumed.manifest is not None
    assert undisturbed.manifest is not None
    assert resumed.manifest["outputs"] == undisturbed.manifest["outputs"]


def test_what_a_crash_left_half_written_is_no_answer(teacher: Teacher, tmp_path: Path) -> None:
    interrupted = stage(teacher, tmp_path, "--generate.max-requests", "8")
    with pytest.raises(UserError, match="max_requests"):
        dataset.generate(interrupted)
    # The state after a kill between write and rename: a part of the file under its temporary name.
    whole = sorted((tmp_path / "tiny_cpu/generate/completions/round=000").glob("*.parquet"))[0]
    whole.with_name(f"{whole.name}.0123.tmp").write_bytes(whole.read_bytes()[:100])
    whole.unlink()

    resumed = stage(teacher, tmp_path)
    dataset.generate(resumed)
    assert len(rows(resumed.run, "dataset.parquet")) == KEPT
    seeds = [request["seed"] for request in teacher.requests]
    assert len(seeds) - len(set(seeds)) == 2  # the two requests of that block


def test_a_few_failures_are_recorded_and_the_run_goes_on(teacher: Teacher, tmp_path: Path) -> None:
    teacher.refusals = [(500, "server_error")]
    done = stage(teacher, tmp_path)
    dataset.generate(done)
    assert done.manifest is not None
    assert done.manifest["counts"]["failed"] == 1
    assert done.manifest["counts"]["kept"] == KEPT


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((429, "insufficient_quota"), r"the teacher refuses \(insufficient_quota\).*scripted refusal"),
        ((401, "invalid_api_key"), r"the teacher refuses \(authentication\)"),
        ((500, "server_error"), r"8 of 8 requests of a round failed: \{'server_error': 8\}.*max_failed_share"),
    ],
)
def test_a_teacher_that_refuses_stops_the_run(
    teacher: Teacher, tmp_path: Path, refusal: tuple[int, str], message: str
) -> None:
    teacher.always = refusal
    with pytest.raises(UserError, match=message):
        dataset.generate(stage(teacher, tmp_path))
    assert len(teacher.requests) == 8  # one round, and no more

    teacher.always = None
    mended = stage(teacher, tmp_path)
    dataset.generate(mended)
    assert mended.manifest is not None
    assert mended.manifest["counts"]["failed"] == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            ("--generate.teacher.model", "scripte"),
            "generate.teacher.model: .* has no model 'scripte'; it has: scripted",
        ),
        (("--generate.teacher.base-url", "http://127.0.0.1:9/v1"), "http://127.0.0.1:9/v1/ cannot be reached"),
        (("--generate.teacher.api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY is not set: export the key"),
    ],
)
def test_bad_access_stops_before_any_request(
    teacher: Teacher, tmp_path: Path, override: tuple[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        dataset.generate(stage(teacher, tmp_path, *override))
    assert not teacher.requests


def test_a_refused_key_stops_before_any_request(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "bad-key")
    with pytest.raises(UserError, match=r"refused \(authentication\)"):
        dataset.generate(stage(teacher, tmp_path))
    assert not teacher.requests
