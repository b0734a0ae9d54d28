"""`alpaca-ray`: doctor, demo, down; and how jobs begin and end."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from alpaca_ray import __version__
from alpaca_ray.config import UserError

if TYPE_CHECKING:
    from alpaca_ray.artifacts import Stage  # pyarrow: not for `--help`


def run_job(main: Callable[[], None]) -> NoReturn:
    """Run a job's main: log lines to stdout; a UserError ends it with its text, no traceback, and exit code 2."""
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("alpaca_ray").setLevel(logging.INFO)  # libraries: warnings only
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(0)


def announce(stage: "Stage") -> None:
    """Say what a finished stage made, and where."""
    assert stage.manifest is not None
    counts = ", ".join(f"{name} {value}" for name, value in stage.manifest["counts"].items())
    took = stage.manifest["wall_time_s"]
    print(f"{stage.name} is done ({took} s): {counts}; artifacts in {stage.run.path(stage.name)}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="alpaca-ray", description="From seed tasks to a served model, on Ray.")
    parser.add_argument("--version", action="version", version=f"alpaca-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what this machine has and what it lacks; exit code 1 if it lacks something")
    demo = commands.add_parser("demo", help="the whole path on this machine: generate, train, evaluate, serve")
    demo.add_argument("--directory", default=".demo", help="where cluster, runs and logs go (default: %(default)s)")
    down = commands.add_parser("down", help="end what the demo left running")
    down.add_argument("--directory", default=".demo", help="as given to the demo (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was done is kept, the same command goes on from there", file=sys.stderr, flush=True)
        return 130


def _doctor(_: argparse.Namespace) -> int:
    from alpaca_ray import doctor

    findings = doctor.examine()
    print(doctor.render(findings))
    return int(any(finding.problem is not None for finding in findings))


def _demo(arguments: argparse.Namespace) -> int:
    from alpaca_ray import demo

    return demo.up(Path(arguments.directory))


def _down(arguments: argparse.Namespace) -> int:
    from alpaca_ray import demo

    return demo.down(Path(arguments.directory))


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"doctor": _doctor, "demo": _demo, "down": _down}


if __name__ == "__main__":
    sys.exit(main())
