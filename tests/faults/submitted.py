"""Jobs as Ray keeps them: submitted without waiting, their state asked of the dashboard."""

import json
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alpaca_ray.cluster.local import LocalCluster
from tests.waiting import wait

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


class Job:
    """`ray job submit --no-wait`, and what became of it."""

    def __init__(self, cluster: LocalCluster, entrypoint: Sequence[str]) -> None:
        self.id = f"fault-{secrets.token_hex(4)}"
        self._ray(
            cluster, "submit", "--no-wait", "--submission-id", self.id, "--working-dir", str(ROOT), "--", *entrypoint
        )

    def stop(self, cluster: LocalCluster) -> None:
        """`ray job stop`, back when the job has ended."""
        self._ray(cluster, "stop", self.id)

    def status(self, cluster: LocalCluster) -> str:
        """As Ray's table of jobs has it."""
        return str(ask(cluster, f"/api/jobs/{self.id}")["status"])

    def ends(self, cluster: LocalCluster) -> str:
        """Wait for it; its last status."""
        wait(lambda: self.status(cluster) in ("SUCCEEDED", "FAILED", "STOPPED"), f"the end of {self.id}")
        return self.status(cluster)

    def log(self, cluster: LocalCluster) -> str:
        """What it printed."""
        return str(ask(cluster, f"/api/jobs/{self.id}/logs")["logs"])

    def _ray(self, cluster: LocalCluster, verb: str, *options: str) -> None:
        command = [RAY, "job", verb, "--address", cluster.dashboard, *options]
        done = subprocess.run(command, env=cluster.environment(), check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def ask(cluster: LocalCluster, path: str) -> Any:
    """The dashboard's JSON at a path."""
    token = (Path(cluster.directory) / "token").read_text()
    request = urllib.request.Request(cluster.dashboard + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
