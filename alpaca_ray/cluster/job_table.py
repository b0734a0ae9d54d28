"""Make a head that has come back look after the jobs in its table.

Ray's job manager starts with the first call that needs it (2.60, dashboard/modules/job/job_agent.py). Until then the
table says RUNNING of jobs whose drivers died with the old head.
"""

import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

AGENT_PORT = 52365  # Ray's default
POLL_EVERY_S = 0.5
CALL_TIMEOUT_S = 10.0


def look_after_jobs(
    agent_port: int,
    headers: Mapping[str, str],
    timeout_s: float,
    pause: Callable[[float], None] = time.sleep,
    now_s: Callable[[], float] = time.monotonic,
) -> bool:
    """Start the job manager of this machine's agent, by asking for the log of a job that never was.

    False if the agent did not answer in time. After it, a job is soon FAILED whose driver is gone.
    """
    url = f"http://127.0.0.1:{agent_port}/api/job_agent/jobs/none/logs"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine
    until_s = now_s() + timeout_s
    while now_s() < until_s:
        try:
            opener.open(urllib.request.Request(url, headers=dict(headers)), timeout=CALL_TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            if error.code == 404:  # it has looked
                return True
        except OSError:
            pass  # the agent is not there yet
        pause(POLL_EVERY_S)
    return False
