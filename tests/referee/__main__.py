"""Run a referee: prints {"port": N} when it listens."""

import argparse
import asyncio
import gc
import json
import signal
import sys

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage

from tests.referee.server import Server
from tests.referee.settings import Settings

MAX_BODY_BYTES = 256 * 2**20  # a batch's file may have 200 MB


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.referee", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--config", default="{}", help="settings as JSON, or @FILE")
    parser.add_argument("--until-stdin-ends", action="store_true", help="stop when the parent is gone")
    options = parser.parse_args()
    config = options.config
    if config.startswith("@"):
        with open(config[1:], encoding="utf-8") as file:
            config = file.read()
    asyncio.run(serve(Settings.model_validate_json(config), options.host, options.port, options.until_stdin_ends))


async def serve(settings: Settings, host: str, port: int, until_stdin_ends: bool) -> None:
    """Listen until a signal comes."""
    # The ledger only grows: scanning it again and again would cost more than its cycles, of which it has none.
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if until_stdin_ends:
        loop.add_reader(sys.stdin.fileno(), stopped.set)  # nothing is ever written there: this is its end
    # Cancellation tells at once when a client leaves.
    handler = web.Server(Server(settings).answer, handler_cancellation=True, access_log=None, request_factory=_request)
    server = await loop.create_server(handler, host, port, backlog=4096)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await stopped.wait()
    server.close()
    await handler.shutdown(timeout=0.0)


def _request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: web.RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=MAX_BODY_BYTES)


if __name__ == "__main__":
    main()
