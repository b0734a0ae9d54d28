"""Where a service without API keys may be reached from: this machine, and nowhere else.

What an ingress sees of the client behind Ray Serve (2.60, seen on a running one): the proxy hands on its own ASGI
scope, so `client` is the peer of the proxy's socket, not the proxy. The proxy's uvicorn puts the last untrusted address
of X-Forwarded-For in its place where that peer is loopback. So a request with such a header came through another proxy
on this machine, or pretends to: who sent it is not known.
"""

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


def check_exposure(host: str, proxy_location: str, has_keys: bool) -> str | None:
    """What is wrong with listening on `host`; None: nothing. `proxy_location`: as in serve_config.yaml."""
    if has_keys or proxy_location == "Disabled" or is_loopback(host):
        return None
    return (
        f"{host} can be reached from other machines, and there are no API keys; make one (alpaca-ray keys make), put "
        "its line into a file and name that in args.admission.key_file, or listen on 127.0.0.1"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address, or only it can have it."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host.lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def keyless_problem(scope: Scope, origins: Collection[str]) -> str | None:
    """Why a request may not be answered by a service without keys; None: it comes from this machine.

    Also refused is what a web page in this machine's browser sends: from an origin that is not among `origins`, or
    under a name of its own that leads to 127.0.0.1 (DNS rebinding).
    """
    headers = Headers(scope=scope)
    client = scope.get("client")
    if client is None or not is_loopback(client[0]) or any(name in headers for name in FORWARDED):
        return "This server has no API keys, so it answers only clients on its own machine"
    if not is_loopback(_hostname(headers.get("host", ""))):
        return "This server has no API keys, so it answers only to the names localhost and 127.0.0.1"
    if "origin" in headers and headers["origin"] not in origins:
        return "This server has no API keys and does not know the web page that asks"
    return None


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
