"""Jobs as a team runs them: a head of its own, `ray job submit`, `serve deploy`."""

import json
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import yaml
from openai import OpenAI

from alpaca_ray.artifacts import open_run
from alpaca_ray.cluster import local
from alpaca_ray.config import UserError
from alpaca_ray.serve.keys import make_key
from tests import leaks
from tests.teacher import Teacher
from tests.waiting import wait

ROOT = Path(__file__).parents[2]
KEY = make_key("canary", ["generate", "detect"])  # the teacher's and the server's: a served model is a teacher too
WATERMARK_KEY = str(secrets.randbits(62) | 1 << 61)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.LocalCluster]:
    environment = {
        "OPENAI_API_KEY": KEY.secret, "ALPACA_RAY_API_KEYS": KEY.line, "ALPACA_RAY_WATERMARK_KEY": WATERMARK_KEY
    }  # fmt: skip
    started = local.start(tmp_path_factory.mktemp("head"), num_cpus=2, extra_environment=environment)
    yield started
    head = psutil.Process(started.pid)
    family = [head, *head.children(recursive=True)]
    local.stop(started)
    assert not [process for process in family if process.is_running()]  # nothing of it is left on the machine


def generate(storage: Path, teacher_url: str, model: str, *overrides: str) -> list[str]:
    return [
        "python", "jobs/generate.py", "--recipe", "tiny_cpu", "--storage-path", str(storage),
        "--generate.teacher.base-url", teacher_url, "--generate.teacher.model", model,
        "--generate.num-instructions", "12", "--generate.requests-per-round", "8", *overrides,
    ]  # fmt: skip


def test_of_two_jobs_of_a_stage_one_makes_it_and_the_other_waits(
    cluster: local.LocalCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = ""

    def is_said(text: str) -> bool:
        nonlocal said
        said += capfd.readouterr().out
        return text in said

    with Teacher(KEY.secret) as teacher, ThreadPoolExecutor(2) as pool, ExitStack() as before_the_pool:
        teacher.may_answer.clear()
        before_the_pool.callback(teacher.may_answer.set)
        entrypoint = generate(tmp_path, teacher.base_url, "scripted")
        jobs = [pool.submit(local.submit, cluster, "generate", entrypoint, ROOT)]
        wait(lambda: teacher.requests, "the first job's first request")
        jobs.append(pool.submit(local.submit, cluster, "generate", entrypoint, ROOT))
        wait(lambda: is_said("is being made by job generate-"), "the second job's word that it waits")
        teacher.may_answer.set()
        for job in jobs:
            job.result()
        teacher.shutdown()

    assert open_run(str(tmp_path), "tiny_cpu").read_table("generate/dataset.parquet").num_rows == 12
    asked = [json.dumps(request, sort_keys=True) for request in teacher.requests]
    assert len(asked) == len(set(asked))
    assert is_said("waiting for its end")
    assert said.count("generate is done") == 2


def test_a_job_that_fails_is_told_from_one_that_succeeds(
    cluster: local.LocalCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"job train-\w+ ended as FAILED"):
        local.submit(cluster, "train", ["python", "jobs/train.py", "--recipe", "tiny_cpu"], ROOT)
    # The job's own message: what it would write would lie in a copy that Ray deletes.
    assert "storage_path 'runs' is relative" in capfd.readouterr().out


def test_a_served_random_model_is_a_teacher_whose_every_answer_is_rejected(
    cluster: local.LocalCluster, tmp_path: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = cluster.serve_port
    args = config["applications"][0]["args"]
    args |= {"model": str(tiny_model), "model_name": "tiny", "max_length": 2048}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    local.deploy(cluster, tmp_path / "serve.yaml", timeout_s=120)

    base_url = f"{cluster.serve_url}/v1"
    with OpenAI(base_url=base_url, api_key=KEY.secret) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
    # A byte is a token to it: the prompt must leave room in its 2,048.
    entrypoint = generate(
        tmp_path, base_url, "tiny", "--generate.max-requests", "2", "--generate.teacher.max-tokens", "8",
        "--generate.num-examples-per-prompt", "1", "--generate.seed-tasks", str(short_seeds(tmp_path)),
    )  # fmt: skip
    with pytest.raises(UserError, match="ended as FAILED"):
        local.submit(cluster, "generate", entrypoint, ROOT)

    assert "kept 0 of 12 instructions after 2 requests" in capfd.readouterr().out
    completions = open_run(str(tmp_path), "tiny_cpu").read_table("generate/completions/round=000").to_pylist()
    assert [row["error"] for row in completions] == [None, None]
    assert all(row["completion_tokens"] > 0 for row in completions)


def short_seeds(directory: Path) -> Path:
    path = directory / "seeds.jsonl"
    path.write_text(
        '{"id": "a", "name": "a", "instruction": "Say yes.", "instances": [{"input": "", "output": "Yes."}], '
        '"is_classification": false}\n'
    )
    return path


def test_the_head_lets_nobody_in_without_the_token(cluster: local.LocalCluster) -> None:
    import urllib.error
    import urllib.request

    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/", timeout=30)
    assert os.stat(Path(cluster.directory) / "token").st_mode & 0o077 == 0


def test_no_secret_lies_in_anything_that_ray_or_we_keep(
    cluster: local.LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    token_file, head = Path(cluster.directory) / "token", psutil.Process(cluster.pid)
    token = token_file.read_text()
    planted = {"key": KEY.secret, "watermark key": WATERMARK_KEY, "Ray's token": token}
    # Ray's session with its logs and packages; the runs that the tests above have made.
    directories = [Path(cluster.temp_dir), tmp_path_factory.getbasetemp()]

    found = [*leaks.in_files(planted, directories), *leaks.in_command_lines(planted, head)]
    found += leaks.in_dashboard(planted, cluster.dashboard, token)

    assert found == [f"Ray's token: {token_file}"]
    told = {"what is no secret": "jobs/generate.py"}  # and would have been found
    assert list(leaks.in_files(told, directories))
    assert list(leaks.in_dashboard(told, cluster.dashboard, token))
    assert list(leaks.in_command_lines({"a process": "gcs_server"}, head))
