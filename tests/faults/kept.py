"""A head as cluster.yaml starts it: `ray start` comes back, and the keeper looks after the GCS."""

import contextlib
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from alpaca_ray.cluster.local import LocalCluster, durable_environment, free_ports
from tests.faults.submitted import RAY, ROOT
from tests.nodes import NUM_TRIES, kill_all

LOG = "gcs-keeper.log"


class KeptHead:
    """`cluster` for jobs and applications; `gcs` to kill."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster

    def gcs(self) -> psutil.Process:
        """The process that is the GCS now."""
        [found] = [p for p in self.processes() if p.name() == "gcs_server"]
        return found

    def processes(self) -> list[psutil.Process]:
        """What Ray has started for this head, apart from what these have started; and the keeper."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if any(self.cluster.temp_dir in word for word in process.info["cmdline"] or []):
                found.append(process)
        return found

    def events(self) -> list[dict[str, Any]]:
        """What the keeper has said."""
        log = Path(self.cluster.temp_dir) / LOG
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@contextlib.contextmanager
def kept_head(num_cpus: int, environment: Mapping[str, str]) -> Iterator[KeptHead]:
    """Start it; end all of it by process ids."""
    home = Path(tempfile.mkdtemp(prefix="arg", dir="/tmp"))  # short: Unix sockets lie below it
    (home / "token").write_text(secrets.token_hex(16))
    (home / "token").chmod(0o600)
    gcs_port, dashboard_port, agent_port, client_port, serve_port = free_ports(5)
    cluster = LocalCluster(str(home), str(home), 0, 0.0, dashboard_port, serve_port, gcs_port)
    given = cluster.environment() | dict(environment) | durable_environment(home / "gcs") | {"HOME": str(home)}
    command = [
        RAY, "start", "--head", "--disable-usage-stats", f"--num-cpus={num_cpus}", f"--temp-dir={home}/r",
        f"--port={gcs_port}", f"--ray-client-server-port={client_port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent_port}",
    ]  # fmt: skip
    head = KeptHead(cluster)
    try:
        for _ in range(NUM_TRIES):
            # Not to pipes, which what it leaves running would hold open.
            with (home / "head.log").open("wb") as log:
                if subprocess.run(command, env=given, stdout=log, stderr=log, check=False).returncode == 0:
                    break
            _end(head)
        else:
            raise RuntimeError(f"the head did not start:\n{(home / 'head.log').read_text()[-2000:]}")
        line = keeper_line().replace("--port 6379", f"--port {gcs_port} --agent-port {agent_port}")
        line = line.replace("/home/ubuntu/venv/bin", str(Path(sys.executable).parent))
        subprocess.run(["bash", "-c", f"({line})"], env=given, cwd=ROOT, check=True, capture_output=True)
        yield head
    finally:
        _end(head)
        shutil.rmtree(home, ignore_errors=True)


def _end(head: KeptHead) -> None:
    """All of it, the keeper first, which would start the GCS again."""
    for process in sorted(head.processes(), key=lambda p: p.name().startswith(("gcs", "raylet"))):
        kill_all(process.pid)


def keeper_line() -> str:
    """The line of cluster.yaml."""
    definition = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    [line] = [c for c in definition["head_start_ray_commands"] if "alpaca_ray.cluster.keeper" in c]
    return str(line)
