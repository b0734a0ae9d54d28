"""A Ray cluster of two nodes on this machine, each node a process group of its own that can be killed."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from alpaca_ray.cluster.local import free_ports

STOP_S = 20.0
NUM_TRIES = 3  # `ray start` gives up on its own node after 30 s, which on a busy machine are soon over
RAY = str(Path(sys.executable).parent / "ray")


class Nodes:
    """`with Nodes() as cluster:` a head, and a second node that `kill_node` ends and starts anew.

    `settings`: variables of both nodes; `options`: of `ray start`, for both.
    """

    def __init__(
        self,
        head_cpus: int = 2,
        node_cpus: int = 2,
        settings: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._head_cpus, self._node_cpus = head_cpus, node_cpus
        self._settings, self._options = dict(settings or {}), tuple(options)
        # A short path: Unix sockets lie below it and may have 107 characters at most.
        self._temp = Path(tempfile.mkdtemp(prefix="arn", dir="/tmp"))
        (self._temp / "token").write_text(secrets.token_hex(16))
        (self._temp / "token").chmod(0o600)
        self._gcs_port, self._client_port = free_ports(2)
        self.head: subprocess.Popen[bytes] | None = None
        self.node: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Nodes":
        self.head = self._start(
            "--head", f"--port={self._gcs_port}", f"--num-cpus={self._head_cpus}", f"--temp-dir={self._temp}/r",
            f"--ray-client-server-port={self._client_port}", "--include-dashboard=false",
        )  # fmt: skip
        try:
            self.node = self._start_node()
        except RuntimeError:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End both nodes and all that runs on them."""
        for process in (self.node, self.head):
            if process is not None:
                kill_all(process.pid)
                process.wait()
        shutil.rmtree(self._temp, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """For a driver on this cluster."""
        return os.environ | {
            "RAY_ADDRESS": f"127.0.0.1:{self._gcs_port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._temp / "token"),
        }

    def kill_node(self) -> None:
        """SIGKILL to the second node and everything on it; another one takes its place."""
        self.lose_node()
        self.return_node()

    def lose_node(self) -> None:
        """SIGKILL to the second node and everything on it."""
        assert self.node is not None
        kill_all(self.node.pid)
        self.node.wait()
        self.node = None

    def return_node(self) -> None:
        """Start a second node in place of the one that was lost."""
        assert self.node is None
        self.node = self._start_node()

    def is_on_node(self, pid: int) -> bool:
        """Whether a process belongs to the second node."""
        return self.node is not None and any(process.pid == pid for process in _family(self.node.pid))

    def raylets_say(self, words: str) -> bool:
        """Whether one of the nodes' raylets has that in its log."""
        logs = (self._temp / "r").glob("session_*/logs/raylet*.*")
        return any(words in log.read_text(errors="replace") for log in logs)

    def workers(self, name: str) -> list[psutil.Process]:
        """Ray's worker processes of this cluster that carry the name of an actor's class."""
        found = []
        for root in (self.head, self.node):
            if root is not None:
                for process in _family(root.pid):
                    with contextlib.suppress(psutil.Error):
                        if f"ray::{name}" in " ".join(process.cmdline()):
                            found.append(process)
        return found

    def _start_node(self) -> subprocess.Popen[bytes]:
        return self._start(f"--address=127.0.0.1:{self._gcs_port}", f"--num-cpus={self._node_cpus}")

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        """`ray start`, which returns from its pipe when the node is up: it prints how to stop it."""
        said = ""
        for _ in range(NUM_TRIES):
            [agent_port] = free_ports(1)
            command = [RAY, "start", "--block", "--disable-usage-stats", f"--dashboard-agent-listen-port={agent_port}"]
            process = subprocess.Popen(
                [*command, *options, *self._options],
                env={k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"} | self._settings,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            for line in _lines(process):
                said += line
                if "Ray runtime started" in line:
                    return process
            process.wait()
        raise RuntimeError(f"the node did not start: {' '.join([*command, *options])}\n{said[-2000:]}")


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    assert process.stdout is not None
    for line in iter(process.stdout.readline, b""):
        yield line.decode(errors="replace")


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def kill_all(pid: int) -> None:
    """SIGKILL to a process and all it has started, as when a machine loses its power."""
    family = _family(pid)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=STOP_S)
