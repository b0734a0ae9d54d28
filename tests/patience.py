"""Ray's time limits, for machines that run several clusters at once."""

import contextlib
import socket

from tests.waiting import wait

START_TIMEOUT_S = 300

PATIENT = {
    # Ray's workers are nice by 15: beside any process that is not, they get a thirtieth of a core.
    "RAY_worker_niceness": "0",
    # A proxy that is not ready in 5 s would be killed and begun again, and so the next one.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "300",
    "RAY_gcs_server_request_timeout_seconds": "120",
}


def start_serve(port: int) -> None:
    """Serve on the Ray cluster of this process, back when its proxy listens on that port of loopback.

    Serve itself waits 60 s, which no setting makes longer; what it has begun goes on.

    Raises:
        AssertionError: no answer in `START_TIMEOUT_S`.
    """
    from ray import serve
    from ray.exceptions import RayActorError

    with contextlib.suppress(TimeoutError, RayActorError):  # GetTimeoutError is a TimeoutError
        serve.start(http_options={"host": "127.0.0.1", "port": port})
    wait(lambda: _listens(port), f"Serve's proxy on port {port}", START_TIMEOUT_S)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except OSError:
        return False
    return True
