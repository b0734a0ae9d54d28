"""No room to spill objects, and no memory: what Ray does then is no end of a generation. About 40 s each."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from alpaca_ray.artifacts import open_run
from alpaca_ray.provider.journal import records
from benchmarks.kills import MAX_IN_FLIGHT, ROOT, Driver, aftermath, job, paid, violations
from tests.faults.table import FaultRow
from tests.nodes import Nodes
from tests.referee.process import RefereeProcess
from tests.waiting import wait

ANSWERS = {"num_tasks": [2, 3], "latency_s": [0.1, 1.0]}
NUM_INSTRUCTIONS = 160  # some 80 requests
ROOM_BYTES = 5 * 10**9  # beyond what the machine uses now: two nodes and a run take 3 GB
OBJECT_STORE_BYTES = 80_000_000  # Ray's least
SPILL = """
import numpy, ray
ray.init(log_to_driver=False)
try:
    held = [ray.put(numpy.ones(20_000_000, numpy.uint8)) for _ in range(8)]
except ray.exceptions.RayError as error:
    print(type(error).__name__)
"""
HOG = """
import time
held = []
while len(held) < 80:
    held.append(b"x" * 100_000_000)
    time.sleep(0.05)
time.sleep(600)
"""

BY_MEMORY = "killed due to memory pressure"

pytestmark = pytest.mark.slow_fault


def test_a_generation_needs_no_room_to_spill(tmp_path: Path, fault_row: FaultRow) -> None:
    is_full = {"RAY_local_fs_capacity_threshold": "0.0001"}  # any disk holds more than that
    small = (f"--object-store-memory={OBJECT_STORE_BYTES}",)
    with Nodes(3, 2, is_full, small) as cluster, RefereeProcess(answers=ANSWERS) as referee:
        probe = [sys.executable, "-c", SPILL]
        done = subprocess.run(probe, env=cluster.environment, capture_output=True, text=True, check=True)
        started_s = time.monotonic()
        environment = cluster.environment | {"PYTHONPATH": str(ROOT)}
        driver = Driver(job(referee, tmp_path, NUM_INSTRUCTIONS), environment, tmp_path / "log")
        wait(driver.finished, "the end of the run")
        took_s = time.monotonic() - started_s
        ledger = paid(referee)
    repaid = len(ledger) - len({entry["key"] for entry in ledger})
    fault_row(
        "spill disk full",
        lost="nothing",
        repeated=f"{repaid} requests: a generation spills nothing",
        recovery_s=took_s,
        until="the end of the whole run; what must spill gets OutOfDiskError",
    )
    assert done.stdout.split()[-1] == "OutOfDiskError", done.stderr  # the fault is there
    assert repaid == 0


def test_a_generation_goes_on_when_ray_kills_its_workers_for_memory(tmp_path: Path, fault_row: FaultRow) -> None:
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + ROOM_BYTES) / memory.total
    if threshold > 0.95:
        pytest.skip("too little memory is free for a test that uses some of it up")
    settings = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    with Nodes(3, 2, settings) as cluster, RefereeProcess(answers=ANSWERS) as referee:
        options = ("--generate.limits.requests-per-minute", "300")
        environment = cluster.environment | {"PYTHONPATH": str(ROOT)}
        driver = Driver(job(referee, tmp_path, NUM_INSTRUCTIONS, *options), environment, tmp_path / "log")
        wait(lambda: driver.finished() or referee.summary()["requests"] >= 20, "twenty requests")
        before = {process.pid for process in cluster.workers("MapWorker") + cluster.workers("LimiterActor")}
        hog = subprocess.Popen([sys.executable, "-c", HOG])
        try:
            wait(lambda: gone(before), "an actor that is killed")
            killed_at = time.time()
            killed = len(gone(before))
        finally:
            hog.kill()
            hog.wait()
        wait(lambda: cluster.raylets_say(BY_MEMORY), "Ray's word that it was for memory")  # it says so once a minute
        wait(driver.finished, "the end of the run")
        ledger = paid(referee)
    late, twice = violations(ledger, list(records(open_run(str(tmp_path), "kills"), "generate/journal")))
    after = aftermath([entry for entry in ledger if entry["status"] != 429], [("memory", killed_at)])["memory"]
    repaid = len(ledger) - len({entry["key"] for entry in ledger})
    fault_row(
        "out of memory",
        lost="nothing",
        repeated=f"{repaid} requests, of {MAX_IN_FLIGHT} that may be in flight; {killed} actors were killed",
        recovery_s=after.silence_s,
        until="longest silence at the teacher",
    )
    assert (late, twice) == (0, 0)
    assert repaid <= MAX_IN_FLIGHT


def gone(pids: set[int]) -> set[int]:
    """Those that do not run any more."""
    return {pid for pid in pids if not psutil.pid_exists(pid)}
