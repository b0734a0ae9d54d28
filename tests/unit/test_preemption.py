"""What clouds say before they take a machine back, and what the watcher makes of it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from alpaca_ray.cluster.notices import CLOUDS, Aws, Fetch, MetadataError, Notice, fetch_by_http, find_cloud
from alpaca_ray.cluster.preemption import (
    DRAIN_EVERY_S,
    DRAINED,
    LONGEST_PAUSE_S,
    NO_CLOUD,
    NOT_DRAINED,
    POLL_EVERY_S,
    WRONG_USE,
    NotDrainedError,
    Watch,
)
from alpaca_ray.config import UserError
from tests.metadata import MetadataServer, azure_event
from tests.waiting import wait

ROOT = Path(__file__).parents[2]
NOW_S = 1_800_000_000.0
NOTICE_TO_DRAIN_S = 5.0
WAIT_S = 60.0

Asks = Callable[[float], Notice | None]


class Scene:
    """Time that passes by pauses only, and the log lines."""

    def __init__(self) -> None:
        self.now_s, self.pauses, self.said = NOW_S, list[float](), list[tuple[str, dict[str, Any]]]()
        self.watch = Watch(lambda: self.now_s, self._pause, lambda event, **about: self.said.append((event, about)))

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.said]

    def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now_s += seconds


class FakeNode:
    """Ray's node, whose head takes a drain after some tries."""

    def __init__(self, failures: int = 0, error: Exception | None = None) -> None:
        self.tries, self._failures = 0, failures
        self._error = error or NotDrainedError("the head does not answer")
        self.drained: list[Notice] = []

    def find(self) -> str:
        return "node"

    def drain(self, notice: Notice) -> str:
        self.tries += 1
        if self.tries <= self._failures:
            raise self._error
        self.drained.append(notice)
        return "node"


def asker(cloud: str, server: MetadataServer) -> Asks:
    return CLOUDS[cloud](fetch_by_http, server.url).ask


def script(*answers: Exception | Notice | None) -> Asks:
    left = list(answers)

    def ask(_: float) -> Notice | None:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


# what each cloud says


@pytest.mark.parametrize(("cloud", "left_s"), [("aws", 120.0), ("gcp", 30.0), ("azure", 45.0)])
def test_each_cloud_says_when(cloud: str, left_s: float) -> None:
    with MetadataServer() as server:
        ask = asker(cloud, server)
        assert ask(NOW_S) is None
        server.take_back(NOW_S + left_s)
        notice = ask(NOW_S)
    assert notice is not None
    assert (notice.deadline_s, notice.is_advice) == (NOW_S + left_s, False)


def test_a_rebalance_recommendation_is_an_advice_and_an_interruption_goes_before_it() -> None:
    with MetadataServer() as server:
        ask = asker("aws", server)
        server.rebalance_s = NOW_S - 60
        first, again = ask(NOW_S), ask(NOW_S + 1)
        assert first is not None
        assert again is not None
        assert first.is_advice
        assert first.what == again.what
        server.take_back(NOW_S + 100)
        notice = ask(NOW_S)
    assert notice == Notice(NOW_S + 100, "interruption: terminate")


def test_a_token_serves_until_it_runs_out_and_is_renewed_then() -> None:
    with MetadataServer() as server:
        ask = asker("aws", server)
        for _ in range(3):
            assert ask(NOW_S) is None
        assert server.num_tokens == 1
        server.forget_tokens()
        server.take_back(NOW_S)
        assert ask(NOW_S) is not None
        assert server.num_tokens == 2


def test_aws_refusals_say_what_to_do() -> None:
    with MetadataServer() as server:
        server.refuses_tokens = True
        with pytest.raises(MetadataError, match=r"403.*--http-endpoint enabled"):
            asker("aws", server)(NOW_S)


def test_a_silent_token_request_names_the_hop_limit() -> None:
    def silent(method: str, url: str, headers: dict[str, str]) -> tuple[int, dict[str, str], str]:
        raise TimeoutError("timed out")

    fetch: Fetch = silent
    with pytest.raises(MetadataError, match="--http-put-response-hop-limit 2"):
        Aws(fetch).ask(NOW_S)


@pytest.mark.parametrize(
    ("word", "is_advice"), [("MIGRATE_ON_HOST_MAINTENANCE", True), ("TERMINATE_ON_HOST_MAINTENANCE", False)]
)
def test_google_moves_a_machine_or_ends_it(word: str, is_advice: bool) -> None:
    with MetadataServer() as server:
        server.maintenance = word
        notice = asker("gcp", server)(NOW_S)
    assert notice == Notice(NOW_S + 60, f"maintenance: {word}", is_advice)


@pytest.mark.parametrize(
    ("kind", "is_advice"),
    [("Preempt", False), ("Terminate", False), ("Reboot", False), ("Redeploy", False), ("Freeze", True)],
)
def test_azure_events_that_ray_does_not_outlive_are_notices(kind: str, is_advice: bool) -> None:
    with MetadataServer() as server:
        server.events = [azure_event(kind, NOW_S + 900)]
        assert asker("azure", server)(NOW_S) == Notice(NOW_S + 900, kind, is_advice)


def test_azure_events_of_other_machines_are_theirs_and_the_worst_counts() -> None:
    with MetadataServer() as server:
        ask = asker("azure", server)
        server.events = [azure_event("Preempt", NOW_S + 5, machine="workers_8")]
        assert ask(NOW_S) is None
        server.events += [azure_event("Freeze", NOW_S + 1), azure_event("Terminate", NOW_S + 300)]
        assert ask(NOW_S) == Notice(NOW_S + 300, "Terminate")


def test_an_azure_event_that_has_begun_leaves_seconds() -> None:
    with MetadataServer() as server:
        server.events = [azure_event("Preempt", None)]
        notice = asker("azure", server)(NOW_S)
    assert notice is not None
    assert NOW_S < notice.deadline_s <= NOW_S + 30


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
@pytest.mark.parametrize("answer", [(500, ""), (200, "<html>"), (200, '{"Events": [{}]}'), (403, "")])
def test_failures_and_nonsense_are_errors_or_advice_never_a_notice(cloud: str, answer: tuple[int, str]) -> None:
    with MetadataServer() as server:
        server.broken = answer
        try:
            notice = asker(cloud, server)(NOW_S)
        except (OSError, ValueError):
            return
    assert notice is not None  # Google's maintenance words are open
    assert notice.is_advice


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_the_cloud_that_answers_is_found(cloud: str) -> None:
    with MetadataServer((cloud,)) as server:
        assert find_cloud(fetch_by_http, {"url": server.url}) == cloud
        url = server.url
    assert find_cloud(fetch_by_http, {"url": url}) is None


def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    with MetadataServer() as server:
        assert asker("gcp", server)(NOW_S) is None


# waiting and draining


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure"])
def test_from_notice_to_drain_in_five_seconds_after_an_outage_too(cloud: str) -> None:
    """The server fails for a minute; the notice is there from a moment within, and is seen when it is back."""
    with MetadataServer() as server:
        scene, node = Scene(), FakeNode()
        cloud_ask = asker(cloud, server)

        def ask(now_s: float) -> Notice | None:
            server.broken = (503, "") if 10 <= now_s - NOW_S < 70 else None
            if now_s - NOW_S >= 65 and server.shown_s is None:
                server.take_back(NOW_S + 120)
            return cloud_ask(now_s)

        notice = scene.watch.until_notice(ask)
        assert scene.watch.drain(node, notice) == DRAINED
    assert scene.now_s - (NOW_S + 70) < NOTICE_TO_DRAIN_S
    assert scene.events == ["metadata_fails", "metadata_answers", "notice", "draining"]
    assert node.drained == [notice]


def test_the_poll_is_fast_enough_and_a_failing_server_is_asked_more_slowly() -> None:
    scene = Scene()
    scene.watch.until_notice(script(None, *[OSError("no route")] * 5, None, Notice(NOW_S, "preempted")))
    assert scene.pauses == [POLL_EVERY_S, 1.0, 2.0, 4.0, 4.0, 4.0, POLL_EVERY_S]
    assert POLL_EVERY_S <= 2.0
    assert LONGEST_PAUSE_S < NOTICE_TO_DRAIN_S
    assert scene.events == ["metadata_fails", "metadata_answers", "notice"]


def test_each_reason_of_a_failing_server_is_told_once() -> None:
    scene = Scene()
    refused, silent = OSError("refused"), MetadataError("the hop limit")
    scene.watch.until_notice(script(refused, refused, silent, silent, Notice(NOW_S, "preempted")))
    assert [about["why"] for event, about in scene.said if event == "metadata_fails"] == ["refused", "the hop limit"]


def test_advice_is_told_once_and_counted_and_drains_only_if_asked_to() -> None:
    one, two = (Notice(NOW_S + 120, f"rebalance recommendation {k}", is_advice=True) for k in range(2))
    scene, end = Scene(), Notice(NOW_S + 9, "interruption: terminate")
    assert scene.watch.until_notice(script(one, one, None, two, one, end)) == end
    assert [about["advices"] for event, about in scene.said if event == "advice"] == [1, 2]
    assert Scene().watch.until_notice(script(None, one), is_drained_on_advice=True) == one


def test_a_head_that_starts_again_is_asked_until_it_takes_the_drain_once() -> None:
    scene, node, notice = Scene(), FakeNode(failures=20), Notice(NOW_S + 30, "preempted")
    assert scene.watch.drain(node, notice) == DRAINED
    assert node.drained == [notice]
    assert scene.now_s == NOW_S + 20 * DRAIN_EVERY_S
    assert scene.events == ["drain_fails", "draining"]


@pytest.mark.parametrize("error", [NotDrainedError("rejected"), UserError("2 Ray nodes run here")])
def test_a_drain_that_is_never_taken_is_tried_until_the_deadline(error: Exception) -> None:
    scene, node = Scene(), FakeNode(failures=10**6, error=error)
    assert scene.watch.drain(node, Notice(NOW_S + 30, "preempted")) == NOT_DRAINED
    assert scene.now_s == NOW_S + 30
    assert scene.events == ["drain_fails", "not_drained"]


# the process, and the line that starts it


def start_line() -> str:
    """The line of cluster.yaml."""
    definition = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    [line] = [c for c in definition["worker_start_ray_commands"] if "alpaca_ray.cluster.preemption" in c]
    return str(line)


def start_by_line(home: Path, url: str) -> None:
    """As Ray's autoscaler runs it on a node (`with_envs`, `_with_interactive`): it comes back at once."""
    line = start_line().replace("--cloud auto", f"--cloud auto --dry-run --metadata-url {url}")
    line = line.replace("/home/ubuntu/venv/bin", str(Path(sys.executable).parent))
    command = f"export RAY_HEAD_IP=127.0.0.1; {line}"
    subprocess.run(
        ["bash", "-c", f"true && ({command})"], env=os.environ | {"HOME": str(home)}, cwd=home, check=True,
        timeout=WAIT_S, capture_output=True,  # a watcher that held on to the pipes would keep this from coming back
    )  # fmt: skip


def lines(home: Path) -> list[dict[str, Any]]:
    log = home / "spot-watcher.log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def events(home: Path) -> list[str]:
    return [line["event"] for line in lines(home)]


@contextmanager
def ended(home: Path) -> Iterator[None]:
    """End what is left of a failed test, by the id in the lock file."""
    try:
        yield
    finally:
        lock = home / "spot-watcher.lock"
        if lock.exists() and f"{lock}" in _command_of(lock.read_text()):
            os.kill(int(lock.read_text()), 9)


def _command_of(pid: str) -> str:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_text().replace("\0", " ") if pid and path.exists() else ""


def test_the_line_of_cluster_yaml_watches_beyond_its_shell_and_a_newer_watcher_ends_the_older(tmp_path: Path) -> None:
    lock = tmp_path / "spot-watcher.lock"
    with MetadataServer(("gcp",)) as server, ended(tmp_path):
        start_by_line(tmp_path, server.url)
        wait(lambda: events(tmp_path) == ["watching"], "the first watcher")
        older = lock.read_text()
        start_by_line(tmp_path, server.url)
        wait(lambda: events(tmp_path) == ["watching", "watching"], "the second watcher")
        assert str(lock) not in _command_of(older)
        assert str(lock) in _command_of(lock.read_text())
        assert server.asked.wait(WAIT_S)
        server.take_back(0.0)  # Google gives no time
        wait(lambda: events(tmp_path)[-1] == "draining", "the drain")
        wait(lambda: str(lock) not in _command_of(lock.read_text()), "the end of the watcher")
    assert events(tmp_path) == ["watching", "watching", "notice", "draining"]
    assert lines(tmp_path)[0]["cloud"] == "gcp"


def test_the_line_names_ray_and_starts_after_it() -> None:
    definition = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    commands = definition["worker_start_ray_commands"]
    assert "ray start" in commands[commands.index(start_line()) - 1]
    assert "RAY_AUTH_MODE=token" in start_line()
    assert "--address $RAY_HEAD_IP:6379" in start_line()


def run_watcher(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alpaca_ray.cluster.preemption", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.mark.parametrize(
    ("options", "code"), [(["--cloud", "azur"], WRONG_USE), (["--cloud", "gcp", "--dry-run"], DRAINED)]
)
def test_exit_codes(options: list[str], code: int) -> None:
    with MetadataServer() as server:
        server.take_back(NOW_S)
        assert run_watcher(*options, "--metadata-url", server.url).returncode == code


def test_a_machine_of_no_cloud_has_nothing_to_watch() -> None:
    scene = Scene()
    with MetadataServer(()) as server:
        assert scene.watch.find("auto", {"url": server.url}) is None
        assert scene.now_s - NOW_S >= 10  # a network that comes late is waited for
    assert NO_CLOUD not in (DRAINED, NOT_DRAINED, WRONG_USE, 1)
