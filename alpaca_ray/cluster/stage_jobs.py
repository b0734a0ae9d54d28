"""The stages as Ray jobs: submit, look, stop, pass the log on. What Ray's client raises becomes a value or Unreachable.

Inside a job Ray's client finds the dashboard by RAY_ADDRESS, and the token as every Ray process of the node does.
"""

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

from alpaca_ray.cluster.job_state import Seen, Unreachable
from alpaca_ray.config import Placement, UserError
from alpaca_ray.settings import ENV_PREFIX

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the driver of a submitted job
REQUEST_TIMEOUT_S = 30.0
LOG_PAUSE_S = 1.0  # before a log whose connection broke is asked for again
LOG_END_S = 10.0  # how long the end of a finished job's log is waited for


@dataclass(frozen=True)
class OwnJob:
    """What the stages' jobs take over from the job that this process is the driver of."""

    runtime_env: dict[str, Any]
    left_out: list[str] = field(default_factory=list)  # names of variables that are not handed on

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "OwnJob":
        """Raises UserError outside a submitted job."""
        if JOB_CONFIG not in environ:
            raise UserError(
                "the pipeline is a job itself, so that it goes on without your terminal: "
                "ray job submit --working-dir . -- python jobs/pipeline.py ..."
            )
        given = json.loads(environ[JOB_CONFIG]).get("runtime_env", {})
        handed_on = {name: value for name, value in given.items() if not name.startswith("_")}
        # Ray keeps these in its job table as they are: only config values, which are no secrets, go there again.
        variables = handed_on.pop("env_vars", None) or {}
        config = {name: value for name, value in variables.items() if name.upper().startswith(ENV_PREFIX)}
        left_out = [name for name in variables if name not in config and not name.startswith("RAY_")]
        return cls(handed_on | ({"env_vars": config} if config else {}), sorted(left_out))


class _Client(JobSubmissionClient):
    # Ray's client waits for ever on a head that has gone.
    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        return super()._do_request(*args, **kwargs, timeout=REQUEST_TIMEOUT_S)


class RayJobs:
    """Jobs by Ray's client, which is made at the first question: the head may be away just then."""

    def __init__(self, runtime_env: Mapping[str, Any]) -> None:
        self._runtime_env = dict(runtime_env)
        logging.getLogger(JobSubmissionClient.__module__).setLevel(logging.WARNING)  # it tells of every log that ends
        self._made: _Client | None = None

    def submit(self, submission_id: str, entrypoint: str, driver: Placement | None) -> None:
        asked: dict[str, Any] = {}
        if driver is not None:
            asked = {
                "entrypoint_num_cpus": driver.num_cpus,
                "entrypoint_num_gpus": driver.num_gpus,
                "entrypoint_label_selector": dict(driver.label_selector) or None,
            }
        with _unreachable():
            self._client().submit_job(
                submission_id=submission_id, entrypoint=entrypoint, runtime_env=self._runtime_env, **asked
            )

    def find(self, prefix: str) -> dict[str, Seen]:
        with _unreachable():
            jobs = self._client().list_jobs()
        submitted = {job.submission_id or "": job for job in jobs if job.type is JobType.SUBMISSION}
        return {name: _seen(job) for name, job in submitted.items() if name.startswith(prefix)}

    def look(self, submission_id: str) -> Seen | None:
        with _unreachable():
            client = self._client()
            with contextlib.suppress(requests.RequestException, RuntimeError):
                return _seen(client.get_job_info(submission_id))
        return self.find(submission_id).get(submission_id)  # it says whether there is none, or no answer

    def stop(self, submission_id: str) -> bool:
        with _unreachable():
            return bool(self._client().stop_job(submission_id))

    @contextlib.contextmanager
    def log(self, submission_id: str, write: Callable[[str], None]) -> Iterator[None]:
        tail = _Tail(self._client, submission_id, write)
        thread = threading.Thread(target=tail.run, daemon=True)
        thread.start()
        yield  # a stopped pipeline has no time for the rest
        tail.ended.set()
        thread.join(LOG_END_S)

    def _client(self) -> _Client:
        if self._made is None:
            self._made = _Client()
        return self._made


class _Tail:
    """One job's log, asked for again from its begin when the connection breaks; no line is written twice."""

    def __init__(self, client: Callable[[], _Client], submission_id: str, write: Callable[[str], None]) -> None:
        self._client, self._submission_id, self._write = client, submission_id, write
        self.ended = threading.Event()
        self._written = 0  # lines

    def run(self) -> None:
        while True:
            is_last = self.ended.is_set()
            with contextlib.suppress(aiohttp.ClientError, OSError, RuntimeError, Unreachable):
                asyncio.run(self._follow())
                is_last |= self.ended.is_set()
            if is_last:
                return
            self.ended.wait(LOG_PAUSE_S)

    async def _follow(self) -> None:
        number, rest = 0, ""
        async for text in self._client().tail_job_logs(self._submission_id):
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                number += 1
                self._write_once(number, line)
        if rest:
            self._write_once(number + 1, rest)

    def _write_once(self, number: int, line: str) -> None:
        if number > self._written:
            self._write(line)
            self._written = number


@contextlib.contextmanager
def _unreachable() -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        raise UserError(f"the cluster takes no job from this one: {error}") from None
    except (requests.RequestException, RayError, OSError, RuntimeError, ValueError) as error:
        raise Unreachable(str(error)) from error


def _seen(job: JobDetails) -> Seen:
    return Seen(
        status=str(job.status.value),
        started_s=(job.start_time or 0) / 1000,
        ended_s=None if job.end_time is None else job.end_time / 1000,
        exit_code=job.driver_exit_code,
        error_type=None if job.error_type is None else str(getattr(job.error_type, "value", job.error_type)),
        message=job.message or "",
    )


def stage_entrypoint(stage: str, argv: list[str], interpreter: str) -> list[str]:
    """The command of a stage, beside the pipeline's own: `argv` is that of the pipeline, sys.argv."""
    return [interpreter, str(Path(argv[0]).with_name(f"{stage}.py")), *argv[1:]]
