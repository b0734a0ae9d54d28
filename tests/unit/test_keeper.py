"""The keeper starts a GCS that died as it was started, and ends with its head. `make faults` has it on a real head."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from alpaca_ray.cluster.job_table import look_after_jobs
from alpaca_ray.cluster.keeper import ENDED, NO_GCS, Kept, find_gcs, is_alive, keep
from alpaca_ray.cluster.local import free_ports
from tests.waiting import wait

DEADLINE_S = 120.0
WAITS = "import time; time.sleep(600)"


def start(directory: Path, name: str, argument: str) -> "subprocess.Popen[bytes]":
    """A process of that name which does nothing."""
    program = directory / name
    if not program.exists():
        program.symlink_to(os.path.realpath(sys.executable))
    return subprocess.Popen([str(program), "-c", WAITS, argument], env=os.environ | {"MARK": "of the first"})


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


@pytest.fixture
def head(tmp_path: Path, port: int) -> "Iterator[tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]]":
    """GCS and raylet."""
    processes = (
        start(tmp_path, "gcs_server", f"--gcs_server_port={port}"),
        start(tmp_path, "raylet", f"--gcs-address=127.0.0.1:{port}"),
    )
    wait(lambda: find_gcs(port), "a GCS")
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_a_gcs_that_dies_is_started_as_it_was_until_the_head_ends(
    head: "tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]", port: int
) -> None:
    gcs, raylet = head
    said: list[str] = []
    codes: list[int] = []

    def watch() -> None:
        codes.append(keep(port, lambda _: time.sleep(0.01), time.monotonic, lambda event, **_: said.append(event)))

    keeper = threading.Thread(target=watch)
    keeper.start()
    wait(lambda: said == ["keeping"], "the keeper's first word")
    first = find_gcs(port)
    gcs.kill()
    wait(lambda: said[-1] == "gcs_started", "a new GCS")
    wait(lambda: find_gcs(port), "a GCS")
    second = find_gcs(port)
    assert isinstance(first, Kept)
    assert isinstance(second, Kept)
    assert second.pid != first.pid
    assert second.command == first.command
    assert second.environment["MARK"] == "of the first"
    raylet.kill()
    raylet.wait()
    os.kill(second.pid, 9)
    keeper.join(DEADLINE_S)
    assert codes == [ENDED]
    assert said == ["keeping", "gcs_died", "gcs_started", "head_ended"]
    assert not is_alive(second.pid)


def test_no_gcs_is_said(port: int) -> None:
    said: list[str] = []
    assert keep(port, time.sleep, time.monotonic, lambda event, **_: said.append(event)) == NO_GCS
    assert said == ["no_gcs"]


class Agent(BaseHTTPRequestHandler):
    """Is not ready the first time."""

    asked: list[tuple[str, str | None]] = []  # noqa: RUF012  # of the one server of the one test

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        self.send_response(404 if len(self.asked) > 1 else 503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_the_agent_is_asked_until_it_has_looked_at_its_jobs() -> None:
    with HTTPServer(("127.0.0.1", 0), Agent) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        assert look_after_jobs(server.server_port, {"Authorization": "Bearer t"}, DEADLINE_S, lambda _: None)
        server.shutdown()
    assert Agent.asked == [("/api/job_agent/jobs/none/logs", "Bearer t")] * 2


def test_an_agent_that_never_answers_is_told_from_one_that_does(port: int) -> None:
    clock = iter(range(100))
    assert not look_after_jobs(port, {}, 10.0, lambda _: None, lambda: float(next(clock)))
