"""The line of cluster.yaml that starts the spot watcher, on a real node: from the cloud's notice to Ray's drain."""

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.metadata import MetadataServer
from tests.nodes import Nodes
from tests.unit.test_preemption import ended, lines, start_line
from tests.waiting import wait

NOTICE_TO_DRAIN_S = 5.0
NODES = """
import json, os
from ray._raylet import GcsClient
from ray.core.generated.common_pb2 import NodeDeathInfo
gcs = GcsClient(address=os.environ["RAY_ADDRESS"])
draining = {str(i) for i in gcs.get_draining_nodes()}
print(json.dumps({
    i.hex(): [node.resources_total["CPU"], i.hex() in draining, NodeDeathInfo.Reason.Name(node.death_info.reason)]
    for i, node in gcs.get_all_node_info().items()
}))
"""


def ask_ray(cluster: Nodes) -> dict[str, tuple[float, bool, str]]:
    """Of each node by its id: CPUs, whether it is drained, why it is dead."""
    done = subprocess.run(
        [sys.executable, "-c", NODES], env=cluster.environment, capture_output=True, text=True, check=True
    )
    return {i: tuple(node) for i, node in json.loads(done.stdout.splitlines()[-1]).items()}


def test_the_line_drains_its_node_in_time(tmp_path: Path) -> None:
    with Nodes(1, 2) as cluster, MetadataServer(("gcp",)) as server, ended(tmp_path):
        before = ask_ray(cluster)
        [node_id] = [i for i, (cpus, _, _) in before.items() if cpus == 2]
        address = cluster.environment["RAY_ADDRESS"]
        # One machine has both nodes here, so the node is named.
        line = start_line().replace("$RAY_HEAD_IP:6379", f"{address} --node-id {node_id} --metadata-url {server.url}")
        line = line.replace("/home/ubuntu/venv/bin", str(Path(sys.executable).parent))
        environment = cluster.environment | {"HOME": str(tmp_path)}
        subprocess.run(["bash", "-c", f"({line})"], env=environment, check=True, capture_output=True)
        wait(lambda: lines(tmp_path), "the watcher")
        assert server.asked.wait(60)
        server.take_back(0.0)  # Google gives 30 s from here
        shown_s = time.monotonic()
        wait(lambda: lines(tmp_path)[-1]["event"] == "draining", "the drain")
        notice_to_drain_s = time.monotonic() - shown_s
        after = ask_ray(cluster)
        said = lines(tmp_path)
    assert [line["event"] for line in said] == ["watching", "notice", "draining"]
    assert {line.get("node_id", node_id) for line in said} == {node_id}
    assert not any(is_draining or "DRAIN" in died for _, is_draining, died in before.values())
    # An idle node has nothing to wait for and ends at once.
    assert [i for i, (_, is_draining, died) in after.items() if is_draining or "DRAIN" in died] == [node_id]
    assert notice_to_drain_s < NOTICE_TO_DRAIN_S
