"""What is wrong with the shell commands that set nodes up and start Ray on them."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from alpaca_ray.config import nearest

# Variables that Ray or we read on a node.
READ = (
    "RAY_AUTH_MODE",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
    "OPENAI_API_KEY",
    "ALPACA_RAY_WATERMARK_KEY",
    "ALPACA_RAY_API_KEYS",
)
CALLBACK = "alpaca_ray.serve.request_headers:proxy_middlewares"
_LOCAL = r"(?:169\.254\.169\.254|metadata\.google\.internal|localhost|127\.0\.0\.1|\[?::1|\[?fd00:ec2::254)"
_TO_SHELL = re.compile(
    r"(?:curl|wget)\b[^|;&]*\|\s*(?:sudo\s+(?:-\S+\s+)*)?(?:\S*/)?(?:ba|z|da)?sh\b"
    r"|sh\s+(?:-\w+\s+)?[\"']?(?:<\(|\$\()\s*(?:curl|wget)\b"
)
_FETCH = re.compile(rf"\b(?:curl|wget)\b[^|;&]*?https?://(?!{_LOCAL})")
_INSTALL = re.compile(
    r"\b(?:(?:pip3?|conda|mamba|apt|apt-get|yum|dnf|npm) (?:-\S+ )*install|uv (?:pip install|sync)|git clone)\b"
)
_NIGHTLY = re.compile(r"ray-wheels|\bray-[\d.]+\.dev\d|\bnightly\b|install[^;&|]* --pre\b")
_UNPINNED_RAY = re.compile(r"\binstall\b[^;&|]*\s[\"']?ray(?:\[[\w,-]*\])?+(?![\w.@/-])(?!\s*(?:==|@))")
_ASSIGNED = re.compile(r"(?<![\w$-])([A-Z][A-Z0-9_]+)=(\"[^\"]*\"|'[^']*'|[^\s;&|]*)")
_ENDS = {";", "&&", "||", "|", "&", "(", ")"}


@dataclass(frozen=True)
class Fault:
    """What is wrong with a command, and the part of it that shows it."""

    message: str
    fragment: str = ""


def setup_faults(command: str) -> Iterator[Fault]:
    """Of a command before Ray starts: what is different on every node that it runs on."""
    yield from _unbalanced(command)
    if found := _NIGHTLY.search(command):
        yield Fault("installs a nightly Ray: name a release, as requirements.lock does", found[0].split(" ")[0])
    elif found := _UNPINNED_RAY.search(command):
        yield Fault("installs whatever Ray is newest: name the version, as requirements.lock does", "ray")
    if found := _TO_SHELL.search(command):
        yield Fault("runs what it downloads: put it into the image", found[0].split(" ")[0])
    elif found := _FETCH.search(command):
        yield Fault("downloads when a node starts: put it into the image", found[0].split(" ")[0])


def start_faults(command: str, has_mode: bool) -> Iterator[Fault]:
    """Of a command that starts Ray, on the head as on workers. `has_mode`: RAY_AUTH_MODE is set elsewhere."""
    yield from setup_faults(command)
    if found := _INSTALL.search(command):
        yield Fault("installs when Ray starts: do it in setup_commands or in the image", found[0])
    yield from _variable_faults(command, has_mode)
    for option in _options(command):
        valid = ray_start_options()
        if option.partition("=")[0] not in valid:
            name = option.partition("=")[0]
            yield Fault(f"ray start has no option {name}{nearest(name, valid)}", name)


def head_faults(command: str) -> Iterator[Fault]:
    """Of the command that starts the head."""
    options = _values(command)
    if "--head" not in options:
        yield Fault("starts no head: ray start needs --head here", "ray start")
    if "--autoscaling-config" not in options:
        yield Fault(
            "no node would ever start: --autoscaling-config=~/ray_bootstrap_config.yaml is missing", "ray start"
        )
    host = options.get("--dashboard-host", "127.0.0.1")  # as ray start has it
    if host not in ("127.0.0.1", "localhost", "::1"):
        message = f"the dashboard runs code for whoever reaches it, and listens on {host}: give 127.0.0.1"
        yield Fault(message, "--dashboard-host")


def worker_faults(command: str, head_port: str | None) -> Iterator[Fault]:
    """Of the command that starts a worker. `head_port`: where the head listens, if it is known."""
    options = _values(command)
    address = options.get("--address")
    if "--head" in options:
        yield Fault("starts a second head: a worker has --address=$RAY_HEAD_IP:PORT instead", "--head")
    elif address is None:
        yield Fault("joins no head: --address=$RAY_HEAD_IP:PORT is missing", "ray start")
    elif "RAY_HEAD_IP" not in address:
        yield Fault("Ray puts the head's address into $RAY_HEAD_IP, and this is another one", "--address")
    elif head_port is not None and address.rpartition(":")[2] != head_port:
        yield Fault(f"the head listens on port {head_port}, not on {address.rpartition(':')[2]}", "--address")


def starts_ray(command: str) -> bool:
    return re.search(r"\bray start\b", command) is not None


def port_of(command: str) -> str:
    """Where the head listens."""
    return _values(command).get("--port", "6379")


def brings_token(command: str) -> bool:
    """Whether the command itself says where Ray's token is."""
    return any(name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") for name, _ in _ASSIGNED.findall(command))


@cache
def ray_start_options() -> Sequence[str]:
    """The names of `ray start`'s options."""
    from ray.scripts.scripts import start

    return [name for option in start.params for name in (*option.opts, *option.secondary_opts)]


def _variable_faults(command: str, has_mode: bool) -> Iterator[Fault]:
    given = {name: value.strip("\"'") for name, value in _ASSIGNED.findall(command)}
    for name in given:
        if name not in READ and (hint := _misspelt(name)):
            yield Fault(f"nothing reads {name}{hint}", f"{name}=")
    mode = given.get("RAY_AUTH_MODE")
    if mode is not None and mode != "token":
        yield Fault(f"RAY_AUTH_MODE is {mode!r}; did you mean 'token'?", "RAY_AUTH_MODE")
    elif mode is None and not has_mode:
        yield Fault("anyone who reaches the port may run code: RAY_AUTH_MODE=token is missing before ray start")
    callback = given.get("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", CALLBACK)
    if callback.startswith("alpaca") and callback != CALLBACK:
        yield Fault(f"there is no {callback}; did you mean {CALLBACK!r}?", callback)


def _misspelt(name: str) -> str:
    """A hint for a name with as many words as one that is read, and nearly its letters."""
    return nearest(
        name, [read for read in READ if read.count("_") == name.count("_") and abs(len(read) - len(name)) < 3]
    )


def _unbalanced(command: str) -> Iterator[Fault]:
    try:
        shlex.split(command)
    except ValueError as error:
        yield Fault(f"the shell cannot read it: {str(error).lower()}")


def _options(command: str) -> list[str]:
    """The options after `ray start`, up to the end of that command."""
    try:
        lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:
        return []
    found = []
    for first, word in enumerate(words[:-1]):
        if word.rpartition("/")[2] == "ray" and words[first + 1] == "start":
            for option in words[first + 2 :]:
                if option in _ENDS:
                    break
                found.append(option)
    return [option for option in found if option.startswith("--")]


def _values(command: str) -> dict[str, str]:
    """Options of `ray start` with their values; a value may stand after `=` or after a space."""
    pairs: dict[str, Any] = dict(re.findall(r"(--[\w-]+)(?:=|\s+)(?![-\s])(\S+)", command))
    return {
        option.partition("=")[0]: pairs.get(option.partition("=")[0], "").strip("\"'") for option in _options(command)
    }
