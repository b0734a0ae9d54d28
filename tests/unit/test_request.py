"""The canonical request: what decides an answer decides its key, and nothing else does."""

from typing import Any

import pytest

from alpaca_ray.config import TeacherConfig
from alpaca_ray.provider.request import Request, body, endpoint, request_key

TEACHER = TeacherConfig(model="gpt-4o-mini")
REQUEST = Request("Write tasks.", seed=7, stop="\n9. Instruction:")
BASE_URL = "https://api.example.com/v1"


def key(request: Request = REQUEST, base_url: str = BASE_URL, **teacher: Any) -> str:
    return request_key(request, TEACHER.model_copy(update=teacher), base_url)


@pytest.mark.parametrize(
    "changed",
    [
        key(REQUEST.of("Write other tasks.", 7)),
        key(REQUEST.of("Write tasks.", 8)),
        key(Request("Write tasks.", seed=7, stop="\n10. Instruction:")),
        key(Request("Write tasks.", seed=7, stop="\n9. Instruction:", chat=True)),
        key(Request("Write tasks.", seed=7, stop="\n9. Instruction:", response_format={"type": "json_object"})),
        key(Request("Write tasks.", seed=7, stop="\n9. Instruction:", sample=1)),
        key(base_url="https://api.example.org/v1"),
        key(base_url="https://api.example.com:8443/v1"),
        key(base_url="https://api.example.com/v2"),
        key(model="gpt-4o"),
        key(temperature=0.5),
        key(top_p=0.9),
        key(max_tokens=10),
    ],
)
def test_what_decides_the_answer_decides_the_key(changed: str) -> None:
    assert changed != key()


@pytest.mark.parametrize(
    "same",
    [
        key(base_url=f"{BASE_URL}/"),
        key(timeout_s=1.0),
        key(max_attempts=1),
        key(api_key_env="OTHER_KEY"),
        key(base_url=BASE_URL),
    ],
)
def test_how_it_is_sent_does_not(same: str) -> None:
    assert same == key()


def test_a_tunnel_or_local_server_may_change_its_port() -> None:
    assert key(base_url="http://127.0.0.1:8000/v1") == key(base_url="http://127.0.0.1:31234/v1")
    assert key(base_url="http://127.0.0.1:8000/v1") != key(base_url="http://127.0.0.1:8000/v2")


def test_a_chat_sends_one_message_and_a_completion_its_prompt() -> None:
    chat = Request("Hello", seed=1, chat=True, response_format={"type": "json_object"})
    assert endpoint(chat) == "chat/completions"
    assert body(chat, TEACHER) == {
        "model": "gpt-4o-mini", "temperature": 1.0, "top_p": 1.0, "seed": 1, "max_completion_tokens": 3072,
        "messages": [{"role": "user", "content": "Hello"}], "response_format": {"type": "json_object"},
    }  # fmt: skip
    assert endpoint(REQUEST) == "completions"
    assert body(REQUEST, TEACHER) == {
        "model": "gpt-4o-mini", "temperature": 1.0, "top_p": 1.0, "seed": 7, "max_tokens": 3072,
        "prompt": "Write tasks.", "stop": ["\n9. Instruction:"],
    }  # fmt: skip
