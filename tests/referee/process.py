"""The referee as a process of its own, for tests and benchmarks."""

import json
import os
import select
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
START_S, STOP_S = 60.0, 10.0  # a busy machine starts slowly


class RefereeProcess:
    """`with RefereeProcess(limits={"requests_per_minute": 600}) as referee:` starts one and ends it by its id.

    The keywords are those of settings.Settings. It dies with this process, too, however that ends.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def __enter__(self) -> "RefereeProcess":
        command = [sys.executable, "-m", "tests.referee", "--until-stdin-ends", "--config", json.dumps(self._settings)]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_S)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self.stop()
            raise RuntimeError(f"the referee did not start within {START_S:g} s; its reason is on stderr")
        self.port = json.loads(line)["port"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """End it; a second time does nothing."""
        process = self._process
        if process is None:
            return
        self._process = None
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def ledger(self) -> list[dict[str, Any]]:
        """All entries, as ledger.Entry has them."""
        entries: list[dict[str, Any]] = self._call("GET", "/referee/ledger")
        return entries

    def summary(self, from_s: float | None = None, until_s: float | None = None) -> dict[str, Any]:
        """As ledger.summary has it."""
        given = {"from_s": from_s, "until_s": until_s}
        query = "&".join(f"{name}={value}" for name, value in given.items() if value is not None)
        counts: dict[str, Any] = self._call("GET", f"/referee/summary?{query}")
        return counts

    def configure(self, **changes: Any) -> dict[str, Any]:
        """Change settings; gives all of them back. Raises ValueError for what the referee refuses."""
        settings: dict[str, Any] = self._call("POST", "/referee/config", changes)
        return settings

    def reset(self) -> None:
        """Empty the ledger in memory and the windows, and forget how often each body came."""
        self._call("POST", "/referee/reset", {})

    def _call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, method=method)
        try:
            # No proxy: the referee is on this machine.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode()) from None
