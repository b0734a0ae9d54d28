"""A scripted teacher: a real HTTP server with OpenAI's completions route, for tests of generation.

Its answers depend on the request's seed alone. It shares no code with alpaca_ray.
"""

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VERBS = ["Describe", "Explain", "Compare", "List", "Rewrite", "Summarise", "Suggest", "Plan", "Classify", "Criticise"]
NOUNS = ["harbour", "violin", "orchard", "glacier", "lantern", "parliament", "bakery", "compass", "meadow", "tunnel"]
ENDS = ["for a child", "in two sentences", "with one example", "as a letter", "without numbers", "step by step"]

Refusal = tuple[int, str]  # status, error code


class Teacher(ThreadingHTTPServer):
    """`requests` holds the body of every completion request; `refusals` are given first, one per request.

    No answer is given before `may_answer` is set, as it is from the start.
    """

    daemon_threads = True

    def __init__(self, key: str = "good-key") -> None:
        super().__init__(("127.0.0.1", 0), _Routes)
        self.key = key
        self.requests: list[dict[str, Any]] = []
        self.refusals: list[Refusal] = []
        self.always: Refusal | None = None
        self.lock = threading.Lock()
        self.may_answer = threading.Event()
        self.may_answer.set()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def next_refusal(self, body: dict[str, Any]) -> Refusal | None:
        with self.lock:
            self.requests.append(body)
            return self.always or (self.refusals.pop(0) if self.refusals else None)


class _Routes(BaseHTTPRequestHandler):
    server: Teacher
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self._send(401, {"error": {"message": "Incorrect API key provided.", "code": "invalid_api_key"}})
        return self._send(200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        refusal = self.server.next_refusal(body)
        self.server.may_answer.wait()
        if refusal:
            return self._send(refusal[0], {"error": {"message": "scripted refusal", "code": refusal[1]}})
        text = tasks(body["seed"])
        usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        return self._send(
            200,
            {"id": f"cmpl-{body['seed']}", "object": "text_completion", "created": 0, "model": "scripted",
             "choices": [choice], "usage": usage},
        )  # fmt: skip

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: pytest shows the failures."""


def tasks(seed: int) -> str:
    """A numbered list that goes on after three examples: two novel tasks, a duplicate, a blocked one, a broken one."""
    rng = random.Random(seed)
    first, second = (
        f"{rng.choice(VERBS)} the {' '.join(rng.sample(NOUNS, 3))} {rng.choice(ENDS)} {rng.randrange(10**6)}."
        for _ in range(2)
    )
    return (
        f" {first}\n4. Input:\n<noinput>\n4. Output:\nAn answer about {first}\n###\n"
        f"5. Instruction: {second}\n5. Input:\nSome input {seed}\n5. Output:\nAnother answer.\n###\n"
        f"6. Instruction: {first}\n6. Input:\n<noinput>\n6. Output:\nAgain.\n###\n"
        f"7. Instruction: Draw a picture of the {first}\n7. Input:\n<noinput>\n7. Output:\nNo.\n###\n"
        f"8. Instruction: Something without an answer\n8. Input:\n<noinput>"
    )
