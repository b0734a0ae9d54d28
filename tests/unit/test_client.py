"""One request over real HTTP: an answer or the name of a failure, never an exception, and never the key."""

import asyncio
import json
import os
import pickle
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from alpaca_ray.config import TeacherConfig, UserError
from alpaca_ray.provider.client import Client, check_access, same_model
from alpaca_ray.provider.failures import FATAL_ERRORS
from alpaca_ray.provider.request import Request
from alpaca_ray.schema import Completion
from tests.teacher import Refusal, Teacher, tasks

KEY = "sk-5ecret-0123456789"


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    with Teacher() as server:
        yield server
        server.shutdown()


class OddServer(ThreadingHTTPServer):
    """Answers everything with `status`, `kind` and `body`; "{authorization}" in the body is filled in."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Odd)
        self.status, self.kind, self.body = 200, "application/json", b""
        self.promised_bytes: int | None = None  # a longer body than is sent: the connection breaks off
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Odd(BaseHTTPRequestHandler):
    server: OddServer

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = self.server.body.replace(b"{authorization}", self.headers["Authorization"].encode())
        self.send_response(self.server.status)
        self.send_header("Content-Type", self.server.kind)
        self.send_header("Content-Length", str(self.server.promised_bytes or len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: pytest shows the failures."""


@pytest.fixture
def odd() -> Iterator[OddServer]:
    with OddServer() as server:
        yield server
        server.shutdown()


def config(base_url: str, **changes: Any) -> TeacherConfig:
    values = {"model": "scripted", "base_url": base_url, "timeout_s": 5.0}
    return TeacherConfig(**(values | changes))


def ask(teacher: TeacherConfig, prompt: str = "Go on:", seed: int = 7, stop: str = "\n9.") -> Completion:
    async def complete() -> Completion:
        client = Client(teacher)
        try:
            return (await client.complete(Request(prompt, seed, stop=stop))).completion
        finally:
            await client.close()

    return asyncio.run(complete())


def check(teacher: TeacherConfig) -> None:
    asyncio.run(check_access(teacher))


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_answer_has_its_text_its_tokens_and_its_id(teacher: Teacher) -> None:
    answer = ask(config(teacher.base_url))
    assert answer.text == tasks(7)
    assert (answer.error, answer.error_detail) == (None, None)
    assert (answer.finish_reason, answer.response_id) == ("stop", "cmpl-7")
    assert (answer.prompt_tokens, answer.completion_tokens) == (100, 50)
    assert 0 < answer.latency_s < 60


def test_a_request_carries_the_config_the_seed_and_the_stop(teacher: Teacher) -> None:
    ask(config(teacher.base_url, max_tokens=9, temperature=0.0, top_p=0.5), "Prompt é", seed=0, stop="\n21. x:")
    assert teacher.requests == [
        {"model": "scripted", "prompt": "Prompt é", "max_tokens": 9, "temperature": 0.0, "top_p": 0.5, "seed": 0,
         "stop": ["\n21. x:"]}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("refusal", "error", "fatal"),
    [
        ((401, "invalid_api_key"), "authentication", True),
        ((403, "unsupported_country"), "authentication", True),
        ((404, "model_not_found"), "model_not_found", True),
        ((400, "context_length_exceeded"), "bad_request", True),
        ((422, "unprocessable"), "bad_request", True),
        ((429, "rate_limit_exceeded"), "rate_limit", False),
        ((429, "insufficient_quota"), "insufficient_quota", True),
        ((500, "server_error"), "server_error", False),
        ((503, "overloaded"), "server_error", False),
    ],
)
def test_a_refusal_has_a_name_and_the_servers_message(
    teacher: Teacher, refusal: Refusal, error: str, fatal: bool
) -> None:
    teacher.always = refusal
    answer = ask(config(teacher.base_url))
    assert (answer.text, answer.error) == (None, error)
    assert answer.error_detail is not None
    assert "scripted refusal" in answer.error_detail
    assert (error in FATAL_ERRORS) == fatal
    assert len(teacher.requests) == 1


def test_a_server_that_is_not_there_is_a_connection_error() -> None:
    answer = ask(config(f"http://127.0.0.1:{unused_port()}/v1"))
    assert (answer.text, answer.error) == (None, "connection")
    assert answer.error_detail


class SlowTeacher(Teacher):
    def next_refusal(self, body: dict[str, Any]) -> Refusal | None:
        time.sleep(0.5)
        return super().next_refusal(body)


def test_a_slow_server_is_a_timeout() -> None:
    with SlowTeacher() as server:
        answer = ask(config(server.base_url, timeout_s=0.1))
        server.shutdown()
    assert (answer.text, answer.error) == (None, "timeout")
    assert 0.1 <= answer.latency_s < 0.5


def test_a_missing_key_is_an_authentication_error_that_names_the_variable(teacher: Teacher) -> None:
    answer = ask(config(teacher.base_url, api_key_env="NO_SUCH_KEY"))
    assert (answer.text, answer.error) == (None, "authentication")
    assert answer.error_detail is not None
    assert "NO_SUCH_KEY is not set" in answer.error_detail
    assert not teacher.requests


def test_the_endpoint_may_come_from_the_environment(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", teacher.base_url)
    assert ask(TeacherConfig(model="scripted")).text == tasks(7)


JSON, HTML = "application/json", "text/html"
ODD_ANSWERS = [
    (200, HTML, b"<html>Log in to the hotel's network</html>"),
    (200, JSON, b""),
    (200, JSON, b"{cut off"),
    (200, JSON, b"null"),
    (200, JSON, b"[]"),
    (200, JSON, b'"text"'),
    (200, JSON, b"{}"),
    (200, JSON, b'{"choices": []}'),
    (200, JSON, b'{"choices": null}'),
    (200, JSON, b'{"choices": [null]}'),
    (200, JSON, b'{"choices": "text"}'),
    (200, JSON, b'{"choices": [{"text": null}]}'),
    (200, JSON, b'{"choices": [{"text": 5}]}'),
    (200, JSON, b'{"choices": [{"message": {"content": "a chat"}}]}'),
    (200, JSON, b'{"error": {"message": "in a 200"}}'),
    (204, JSON, b""),
    (302, HTML, b""),
    (400, HTML, b"<html>"),
    (400, JSON, b'"oops"'),
    (429, JSON, b'{"error": "a string"}'),
    (429, JSON, b'{"error": {"message": "m", "code": 429}}'),
    (502, HTML, b"<html>Bad gateway</html>"),
]


@pytest.mark.parametrize(("status", "kind", "body"), ODD_ANSWERS)
def test_an_odd_answer_is_a_failure_with_a_name_and_no_exception(
    odd: OddServer, status: int, kind: str, body: bytes
) -> None:
    odd.status, odd.kind, odd.body = status, kind, body
    answer = ask(config(odd.base_url))
    assert answer.text is None
    assert answer.error in ({"bad_response"} if status < 300 else FATAL_ERRORS | {"rate_limit", "server_error"})
    assert answer.error_detail


@pytest.mark.parametrize(
    ("answered", "same"),
    [("gpt-4o", True), ("gpt-4o-2024-08-06", True), ("openai/gpt-4o", True), ("gpt-4o-mini", False), ("gpt-4", False)],
)
def test_a_dated_version_is_the_same_model_and_a_smaller_one_is_not(answered: str, same: bool) -> None:
    assert same_model("gpt-4o", answered) == same


@pytest.mark.parametrize("usage", [b"", b', "usage": null', b', "usage": {}', b', "usage": {"total_tokens": 3}'])
def test_a_server_that_counts_no_tokens_still_answers(odd: OddServer, usage: bytes) -> None:
    odd.body = b'{"choices": [{"text": "x", "finish_reason": "stop"}]' + usage + b"}"
    answer = ask(config(odd.base_url))
    assert (answer.text, answer.error) == ("x", None)
    assert (answer.prompt_tokens, answer.completion_tokens) == (0, 0)


@pytest.mark.parametrize("said", [b"", b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 two hundred\r\n\r\n"])
def test_a_server_that_speaks_no_http_is_a_connection_error(said: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(said)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        answer = ask(config(f"http://127.0.0.1:{server.getsockname()[1]}/v1"))
        thread.join(10)
    assert (answer.text, answer.error) == (None, "connection")


def test_an_answer_that_breaks_off_is_a_connection_error(odd: OddServer) -> None:
    odd.body, odd.promised_bytes = b'{"choices": [', 1000
    assert ask(config(odd.base_url)).error == "connection"


@pytest.mark.parametrize("base_url", ["localhost:8000/v1", "http://[::1"])
def test_an_address_that_is_none_is_a_failure_and_no_exception(base_url: str) -> None:
    answer = ask(config(base_url))
    assert answer.text is None
    assert answer.error in {"connection", "bad_request"}
    with pytest.raises(UserError, match=re.escape(base_url)):
        check(config(base_url))


@pytest.mark.parametrize("key", ["clé-5ecret", "5ecret\x7f\n5ecret"])
def test_a_key_that_cannot_be_sent_is_a_failure_and_no_exception(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    answer = ask(config(teacher.base_url))
    assert answer.text is None
    assert answer.error == "authentication"
    assert "5ecret" not in repr(answer)
    with pytest.raises(UserError) as caught:
        check(config(teacher.base_url))
    assert "5ecret" not in str(caught.value)


def test_access_is_fine(teacher: Teacher) -> None:
    check(config(teacher.base_url))
    assert not teacher.requests  # nothing that costs was asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "scripte"}, r"generate\.teacher\.model: .* has no model 'scripte'; it has: scripted"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is not set: export the key"),
    ],
)
def test_access_that_cannot_work_is_said_with_a_remedy(teacher: Teacher, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(config(teacher.base_url, **changes))


def test_a_refused_key_and_an_absent_server_are_told_apart(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "bad-key")
    with pytest.raises(UserError, match=r"refused \(authentication\): .*Incorrect API key"):
        check(config(teacher.base_url))
    absent = f"http://127.0.0.1:{unused_port()}/v1"
    with pytest.raises(UserError, match=f"{absent}/ cannot be reached"):
        check(config(absent))


def test_a_server_without_a_list_of_models_is_let_pass(odd: OddServer) -> None:
    odd.status, odd.body = 404, b"{}"
    check(config(odd.base_url))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (HTML, b"<html>Log in to the hotel's network</html>"),
        (JSON, b"{cut off"),
        (JSON, b"null"),
        (JSON, b"[]"),
        (JSON, b"{}"),
        (JSON, b'{"data": "x"}'),
        (JSON, b'{"data": [null]}'),
        (JSON, b'{"data": [{"id": 5}, {}]}'),
    ],
)
def test_an_endpoint_that_is_no_such_api_is_a_user_error(odd: OddServer, kind: str, body: bytes) -> None:
    odd.kind, odd.body = kind, body
    with pytest.raises(UserError, match=re.escape(odd.base_url)):
        check(config(odd.base_url))


def test_the_key_never_comes_back(teacher: Teacher, odd: OddServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    teacher.refusals = [(401, "invalid_api_key"), (429, "insufficient_quota")]
    answers = [ask(config(teacher.base_url)) for _ in range(3)]
    answers.append(ask(config(f"http://127.0.0.1:{unused_port()}/v1")))
    # A server may quote what it was sent, as some proxies do.
    odd.status, odd.body = 401, json.dumps({"error": {"message": "Incorrect API key: {authorization}"}}).encode()
    answers.append(ask(config(odd.base_url)))
    for answer in answers:
        assert KEY not in repr(answer)
        assert KEY not in str(answer)
        assert KEY.encode() not in pickle.dumps(answer)

    for base_url in (teacher.base_url, odd.base_url):
        with pytest.raises(UserError) as caught:
            check(config(base_url))
        assert KEY not in str(caught.value)
        assert KEY.encode() not in pickle.dumps(caught.value)
    assert os.environ["OPENAI_API_KEY"] == KEY  # it was there to be found
