"""The doctor: each check with a good and a bad value, and a report that says what to do."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alpaca_ray.doctor import (
    MIN_PACKAGES,
    PORTS,
    Finding,
    check_cache,
    check_cores,
    check_memory,
    check_package,
    check_port,
    check_python,
    check_token,
    is_free,
    render,
)

NAMES = ["python", *MIN_PACKAGES, "cores", "memory", "cache", "token", *(f"port {port}" for port in PORTS)]


@pytest.mark.parametrize(
    ("check", "arguments", "value", "problem"),
    [
        (check_python, ((3, 11),), "3.11", None),
        (check_python, ((3, 13),), "3.13", None),
        (check_python, ((4, 0),), "4.0", None),
        (check_python, ((3, 10),), "3.10", "Python 3.11 or newer"),
        (check_python, ((3, 9),), "3.9", "Python 3.11 or newer"),
        (check_package, ("ray", "2.60.0"), "2.60.0", None),
        (check_package, ("ray", "3.0.0.dev0"), "3.0.0.dev0", None),
        (check_package, ("ray", "2.59.9"), "2.59.9", "2.60 or newer is needed: pip install"),
        (check_package, ("ray", "2.9.1"), "2.9.1", "2.60 or newer"),  # older by number, newer by letter
        (check_package, ("ray", None), "not installed", "pip install"),
        (check_package, ("torch", "2.13.0+cu130"), "2.13.0+cu130", None),
        (check_package, ("torch", "2.14.0a0+git1234"), "2.14.0a0+git1234", None),
        (check_package, ("torch", "2.14rc1"), "2.14rc1", None),
        (check_package, ("torch", "2.12.1"), "2.12.1", "2.13 or newer"),
        (check_cores, (2,), "2", None),
        (check_cores, (1,), "1", "2 workers"),
        (check_memory, (8.0,), "8 GB", None),
        (check_memory, (7.4,), "7 GB", "needs 8 GB"),
    ],
)
def test_a_value_and_what_is_wrong_with_it(
    check: Callable[..., Finding], arguments: tuple[Any, ...], value: str, problem: str | None
) -> None:
    finding = check(*arguments)
    assert finding.value == value
    if problem is None:
        assert finding.problem is None
    else:
        assert finding.problem is not None
        assert problem in finding.problem


def test_a_cache_with_room_is_fine_and_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "some-model").mkdir()
    (tmp_path / "some-model.lock").touch()
    finding = check_cache(tmp_path, free_bytes=lambda path: 5_000_000_000)
    assert finding.problem is None
    assert finding.value == f"{tmp_path} (5 GB free; holds: some-model)"


def test_a_cache_that_is_not_there_yet_is_judged_by_the_directory_above(tmp_path: Path) -> None:
    asked: list[Path] = []

    def free_bytes(path: Path) -> int:
        asked.append(path)
        return 10**12

    finding = check_cache(tmp_path / "a" / "b", free_bytes)
    assert finding.problem is None
    assert "nothing yet" in finding.value
    assert asked == [tmp_path]
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_a_problem(tmp_path: Path) -> None:
    finding = check_cache(tmp_path, free_bytes=lambda path: 4_999_999_999)
    assert finding.problem is not None
    assert "5 GB" in finding.problem
    assert "ALPACA_RAY_CACHE" in finding.problem


@contextlib.contextmanager
def as_a_user_who_may_not_write(directory: Path) -> Iterator[None]:
    """For `os.access`, which asks for the real user: root may write everywhere."""
    directory.chmod(0o500)
    if os.getuid() == 0:
        os.setreuid(65534, -1)
    try:
        yield
    finally:
        if os.geteuid() == 0:
            os.setreuid(0, -1)
        directory.chmod(0o700)


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    with as_a_user_who_may_not_write(tmp_path):
        finding = check_cache(tmp_path / "cache", free_bytes=lambda path: 10**12)
    assert finding.problem is not None
    assert "cannot be written" in finding.problem
    assert "ALPACA_RAY_CACHE" in finding.problem


def test_a_cache_below_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert check_cache(tmp_path / "file" / "cache", free_bytes=lambda path: 10**12).problem is not None


def test_a_token_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "token"
    assert check_token(path).problem is None  # Ray will make one
    path.touch(mode=0o600)
    assert check_token(path) == Finding("token", str(path), None)
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        assert check_token(path).problem == f"others on this machine can read it: chmod 600 {path}"


def test_a_taken_port_is_a_problem_that_names_what_wanted_it() -> None:
    assert check_port(8000, free=True) == Finding("port 8000", "free (Ray Serve)", None)
    taken = check_port(8000, free=False)
    assert taken.problem is not None
    assert "Ray Serve another port" in taken.problem
    assert "taken" in taken.value


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_is_free_unless_something_listens_there(address: str) -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        server.bind((address, 0))
        server.listen()
        port = server.getsockname()[1]
        assert not is_free(port)
    assert is_free(port)
    assert is_free(port)  # asking does not take it


def test_the_report_shows_every_finding_and_each_problem_below_its_line() -> None:
    lines = render([Finding("cores", "8"), Finding("memory", "4 GB", "buy more"), Finding("token", "/t")]).splitlines()
    assert len(lines) == 4
    assert [line.split()[:2] for line in lines] == [["ok", "cores"], ["BAD", "memory"], ["->", "buy"], ["ok", "token"]]
    assert len({line.index(value) for line, value in zip(lines, ("8", "4 GB", "->", "/t"), strict=True)}) == 1


def test_the_command_names_every_check_and_its_exit_code_tells_whether_all_are_well() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "alpaca_ray.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if not line.lstrip().startswith("->")]
    assert [re.split(r"\s{2,}", line[5:])[0] if len(line) > 5 else line for line in lines] == NAMES
    assert all(line.startswith(("ok ", "BAD")) for line in lines)
    assert done.returncode == int(any(line.startswith("BAD") for line in lines))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "psutil" in imported
    assert not imported & {"ray", "torch", "transformers"}
