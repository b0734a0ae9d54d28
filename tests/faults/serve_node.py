"""One of two nodes is lost under streams of a served model.

python -m tests.faults.serve_node OUT.json

In a process of its own: the driver of a cluster that no other test of this process may find.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil

from benchmarks.serve_kills import DEADLINE_S, Heard, Service, stall_s, wait
from tests.nodes import Nodes
from tests.patience import PATIENT, start_serve

NUM_STREAMS = 8
MAX_TOKENS = 300
PAUSE_S = 0.2


def persist(here: Service, number: int, heard: Heard) -> int:
    """Listen to a stream to its end, asking again when it is cut, as a client does. Gives how often it was."""
    until_s = time.monotonic() + DEADLINE_S
    cuts = 0
    while heard.finish_reason is None:
        assert time.monotonic() < until_s, f"stream {number} never ended"
        heard.text = ""
        with contextlib.suppress(openai.OpenAIError, httpx2.HTTPError):
            here.listen(number, MAX_TOKENS, heard)
        if heard.finish_reason is None:
            cuts += 1
            time.sleep(PAUSE_S)
    return cuts


def lose_a_node(cluster: Nodes, here: Service) -> dict[str, Any]:
    """Eight streams, and the second node lost in their midst."""
    here.deploy(here.args(num_replicas=2))
    whole = [here.ask(number, MAX_TOKENS) for number in range(NUM_STREAMS)]
    on_node = [process for process in here.engines() if cluster.is_on_node(process.pid)]
    ingress = [
        p for p in psutil.process_iter(["cmdline"]) if f"{here.name}:Ingress" in " ".join(p.info["cmdline"] or [])
    ]
    ingress_on_node = any(cluster.is_on_node(process.pid) for process in ingress)
    heard = [Heard() for _ in whole]
    with ThreadPoolExecutor(NUM_STREAMS) as clients:
        listening = [clients.submit(persist, here, number, heard[number]) for number in range(NUM_STREAMS)]
        wait(lambda: sum(len(h.text) for h in heard) > 0.2 * sum(map(len, whole)), "a fifth of the text")
        killed_s = time.monotonic()
        cluster.lose_node()
        cuts = [future.result() for future in listening]
    return {
        "engines_on_node": len(on_node),
        "ingress_on_node": ingress_on_node,
        "cut": sum(count > 0 for count in cuts),
        "same": sum(h.text == text for h, text in zip(heard, whole, strict=True)),
        "recovery_s": max((s for h in heard if (s := stall_s(h, killed_s)) is not None), default=0.0),
    }


def main(out: Path) -> None:
    with Nodes(1, 1) as cluster, tempfile.TemporaryDirectory() as directory:
        os.environ |= PATIENT | cluster.environment | {"OMP_NUM_THREADS": "1"}
        import ray
        from ray import serve

        ray.init(log_to_driver=False)
        here = Service(Path(directory))
        with contextlib.suppress(TimeoutError, ray.exceptions.RayActorError):
            # Both nodes are this machine: one port, one proxy.
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": here.port})
        start_serve(here.port)
        out.write_text(json.dumps(lose_a_node(cluster, here)))
        ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
