"""`alpaca-ray`: doctor, demo, down; and how jobs begin and end."""

import logging
import sys
from collections.abc import Callable
from typing import NoReturn

from alpaca_ray.artifacts import Stage
from alpaca_ray.config import UserError


def run_job(main: Callable[[], None]) -> NoReturn:
    """Run a job's main: log lines to stdout; a UserError ends it with its text, no traceback, and exit code 2."""
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(0)


def announce(stage: Stage) -> None:
    """Say what a finished stage made, and where."""
    assert stage.manifest is not None
    counts = ", ".join(f"{name} {value}" for name, value in stage.manifest["counts"].items())
    took = stage.manifest["wall_time_s"]
    print(f"{stage.name} is done ({took} s): {counts}; artifacts in {stage.run.path(stage.name)}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(main())
