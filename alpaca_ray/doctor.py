"""`alpaca-ray doctor`: what this machine has, what a run needs, and what to do where the two differ."""

import importlib.metadata
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from alpaca_ray.models import CACHE_ENV, cache_dir

MIN_PYTHON = (3, 11)
MIN_PACKAGES = {"ray": (2, 60), "torch": (2, 13)}
MIN_CORES = 2
MIN_MEMORY_GB = 8  # the demo's peak is about 6: two fp32 training workers of the 135M model beside Ray
MIN_DISK_GB = 5  # model cache 0.6, a run 3, Ray's logs and object spill
PORTS = {8265: "Ray's dashboard", 6379: "Ray's head", 8000: "Ray Serve"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `problem` says what is wrong and what to do, None where all is well."""

    name: str
    value: str
    problem: str | None = None


def examine() -> list[Finding]:
    """Every check, in the order of the report. Imports neither ray nor torch."""
    return [
        check_python(sys.version_info[:2]),
        *(check_package(name, _version(name)) for name in MIN_PACKAGES),
        check_cores(psutil.cpu_count() or 1),
        check_memory(psutil.virtual_memory().total / 1e9),
        check_cache(cache_dir()),
        check_token(_token_path()),
        *(check_port(port, is_free(port)) for port in PORTS),
    ]


def check_python(version: tuple[int, ...]) -> Finding:
    problem = None if version >= MIN_PYTHON else "Python 3.11 or newer is needed: make the environment with one"
    return Finding("python", ".".join(map(str, version)), problem)


def check_package(name: str, version: str | None) -> Finding:
    wanted = ".".join(map(str, MIN_PACKAGES[name]))
    if version is None:
        return Finding(name, "not installed", "install the project: pip install -r requirements.lock -e .")
    too_old = tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MIN_PACKAGES[name]
    problem = f"{wanted} or newer is needed: pip install -r requirements.lock" if too_old else None
    return Finding(name, version, problem)


def check_cores(cores: int) -> Finding:
    problem = None if cores >= MIN_CORES else f"the demo trains on {MIN_CORES} workers and needs a core for each"
    return Finding("cores", str(cores), problem)


def check_memory(memory_gb: float) -> Finding:
    problem = None if memory_gb >= MIN_MEMORY_GB else f"the demo needs {MIN_MEMORY_GB} GB"
    return Finding("memory", f"{memory_gb:.0f} GB", problem)


def check_cache(
    directory: Path, free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
) -> Finding:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free_gb = free_bytes(existing) / 1e9
    problem = None
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        problem = f"cannot be written: name another directory in {CACHE_ENV}"
    elif free_gb < MIN_DISK_GB:
        problem = f"the demo needs {MIN_DISK_GB} GB of disk: free some, or name another directory in {CACHE_ENV}"
    models = sorted(path.name for path in directory.glob("*/")) if directory.is_dir() else []
    return Finding(
        "cache", f"{directory} ({free_gb:.0f} GB free; holds: {', '.join(models) or 'nothing yet'})", problem
    )


def check_token(path: Path) -> Finding:
    if not path.is_file():
        return Finding("token", f"{path} (none yet; Ray makes one at the first start)")
    readable_by_others = path.stat().st_mode & 0o077
    problem = f"others on this machine can read it: chmod 600 {path}" if readable_by_others else None
    return Finding("token", str(path), problem)


def check_port(port: int, free: bool) -> Finding:
    what = PORTS.get(port, "in use by this project")
    problem = None if free else f"in use: end what listens there, or give {what} another port"
    return Finding(f"port {port}", f"{'free' if free else 'taken'} ({what})", problem)


def is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:`port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def render(findings: list[Finding]) -> str:
    """The report as aligned lines, problems below what they concern."""
    lines = []
    for finding in findings:
        lines.append(f"{'ok ' if finding.problem is None else 'BAD'}  {finding.name:<10} {finding.value}")
        if finding.problem is not None:
            lines.append(f"     {'':<10} -> {finding.problem}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _token_path() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
