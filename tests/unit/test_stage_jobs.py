"""Ray's own client against a dashboard of the tests: what it raises becomes a value, Unreachable or a UserError."""

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import ray

from alpaca_ray.cluster.job_state import Seen, Unreachable
from alpaca_ray.cluster.stage_jobs import RayJobs
from alpaca_ray.config import Placement, UserError

RUNNING = {
    "type": "SUBMISSION",
    "submission_id": "train-ab-1",
    "status": "RUNNING",
    "entrypoint": "x",
    "start_time": 1500,
}
KILLED = RUNNING | {
    "submission_id": "train-ab-2", "status": "FAILED", "end_time": 2500, "driver_exit_code": 137, "message": "why",
    "error_type": "JOB_ENTRYPOINT_COMMAND_ERROR",
}  # fmt: skip
DRIVER = {"type": "DRIVER", "job_id": "02000000", "status": "RUNNING", "entrypoint": "x"}


class Dashboard(ThreadingHTTPServer):
    """`jobs` is its table, `status` what it answers with; `asked` holds method, path, Authorization and body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Routes)
        self.jobs: list[dict[str, Any]] = [RUNNING, KILLED, DRIVER]
        self.status = 200
        self.asked: list[tuple[str, str, str, Any]] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class _Routes(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        self.note(None)
        if self.path == "/api/version":
            version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
            return self.answer(200, version)
        if self.path == "/api/jobs/":
            return self.answer(self.server.status, self.server.jobs)
        found = [job for job in self.server.jobs if job.get("submission_id") == self.path.rpartition("/")[2]]
        return self.answer(self.server.status if found else 404, found[0] if found else "does not exist")

    def do_POST(self) -> None:
        self.note(json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null"))
        stops = self.path.endswith("/stop")
        self.answer(self.server.status, {"stopped": True} if stops else {"job_id": "j", "submission_id": "s"})

    def note(self, body: Any) -> None:
        self.server.asked.append((self.command, self.path, self.headers["Authorization"], body))

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: pytest shows the failures."""


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    with Dashboard() as server:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


def test_jobs_are_seen_as_ray_has_them(dashboard: Dashboard) -> None:
    jobs = RayJobs({})
    killed = Seen("FAILED", 1.5, 2.5, 137, "JOB_ENTRYPOINT_COMMAND_ERROR", "why")
    assert jobs.find("train-ab-") == {"train-ab-1": Seen("RUNNING", 1.5), "train-ab-2": killed}
    assert jobs.find("generate-") == {}
    assert jobs.look("train-ab-2") == killed
    assert jobs.look("train-ab-3") is None
    assert jobs.stop("train-ab-1")


def test_a_job_takes_nothing_along_but_what_it_is_given(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-canary")
    jobs = RayJobs({"working_dir": "gcs://a.zip"})
    jobs.submit("train-ab-3", "python jobs/train.py", None)
    jobs.submit("train-ab-4", "python jobs/train.py", Placement(num_cpus=2, label_selector={"group": "train"}))
    on_the_head, elsewhere = (body for method, _, _, body in dashboard.asked if method == "POST")
    assert on_the_head == {
        "entrypoint": "python jobs/train.py", "submission_id": "train-ab-3", "metadata": {},
        "runtime_env": {"working_dir": "gcs://a.zip"},
    }  # fmt: skip
    assert elsewhere["entrypoint_num_cpus"] == 2
    assert elsewhere["entrypoint_label_selector"] == {"group": "train"}
    # The token goes with every request, as every process of the cluster takes it.
    assert {token for _, _, token, _ in dashboard.asked} == {f"Bearer {'test-' * 8}"}


@pytest.mark.parametrize("status", [404, 500, 503])
def test_a_dashboard_that_does_not_know_is_unreachable(dashboard: Dashboard, status: int) -> None:
    jobs = RayJobs({})
    dashboard.status = status
    for ask in (lambda: jobs.find(""), lambda: jobs.look("train-ab-1"), lambda: jobs.submit("x", "y", None)):
        with pytest.raises(Unreachable):
            ask()


def test_a_dashboard_that_is_not_there_is_unreachable_until_it_is(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = RayJobs({})
    with monkeypatch.context() as patch:
        patch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
        with pytest.raises(Unreachable):
            jobs.look("train-ab-1")
    assert jobs.look("train-ab-1") is not None


def test_a_wrong_token_is_for_the_user_to_mend(dashboard: Dashboard) -> None:
    dashboard.status = 403
    with pytest.raises(UserError, match="the cluster takes no job from this one"):
        RayJobs({}).find("")


class BreakingLog:
    """A log of four lines, in chunks that end anywhere; the first `breaks` connections end too soon."""

    def __init__(self, breaks: int) -> None:
        self.breaks = breaks

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for number, chunk in enumerate(("one\ntw", "o\n", "three\nfo", "ur")):
            if number == 2 and self.breaks:
                self.breaks -= 1
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield chunk


@pytest.mark.parametrize("breaks", [0, 1, 2])
def test_every_line_of_a_log_is_written_once_however_often_it_breaks(
    breaks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, lines = RayJobs({}), list[str]()
    monkeypatch.setattr(jobs, "_made", BreakingLog(breaks))
    with jobs.log("train-ab-1", lines.append):
        until_s = time.monotonic() + 120
        while len(lines) < 4 and time.monotonic() < until_s:
            time.sleep(0.01)
    assert lines == ["one", "two", "three", "four"]
