"""`alpaca-ray`: doctor, demo, down, estimate, diff; and how jobs begin and end."""

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
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and arguments.command != "estimate":
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    arguments.overrides = overrides
    try:
        return COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was done is kept, the same command goes on from there", file=sys.stderr, flush=True)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alpaca-ray", description="From seed tasks to a served model, on Ray.")
    parser.add_argument("--version", action="version", version=f"alpaca-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what this machine has and what it lacks; exit code 1 if it lacks something")
    demo = commands.add_parser("demo", help="the whole path on this machine: generate, train, evaluate, serve")
    demo.add_argument("--directory", default=".demo", help="where cluster, runs and logs go (default: %(default)s)")
    down = commands.add_parser("down", help="end what the demo left running")
    down.add_argument("--directory", default=".demo", help="as given to the demo (default: %(default)s)")
    estimate = commands.add_parser(
        "estimate",
        help="memory, time and cost of a training run before it starts; exit code 1 if it cannot fit",
        epilog="--recipe NAME or --config FILE, and overrides such as --train.micro-batch-size 2, as jobs take them",
        allow_abbrev=False,
    )
    estimate.add_argument("--gpu", help="a type such as a100-80gb (default: that, or none for a recipe without GPUs)")
    estimate.add_argument("--mfu", type=float, help="share of the GPU's peak that useful tokens get (default: 0.4)")
    estimate.add_argument("--tokens-per-example", type=float, help="prompt and answer (default: 139, Alpaca's)")
    diff = commands.add_parser("diff", help="a tuned model as its exact difference from a base, and back")
    actions = diff.add_subparsers(dest="action", required=True)
    for action, given, what in (("make", "--tuned", "tuned model"), ("recover", "--diff", "directory of the diff")):
        verb = actions.add_parser(action)
        verb.add_argument("--base", required=True, help="the base model: a directory, a URI or a hub id")
        verb.add_argument(given, required=True, dest="source", help=f"the {what}")
        verb.add_argument("--out", required=True, help="a directory that does not exist yet")
    return parser


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


def _estimate(arguments: argparse.Namespace) -> int:
    from alpaca_ray.settings import load_config
    from alpaca_ray.train import estimate

    config = load_config(arguments.overrides)
    asked = {name: getattr(arguments, name) for name in ("mfu", "tokens_per_example")}
    basis = estimate.Basis(**{name: value for name, value in asked.items() if value is not None})
    gpu = arguments.gpu or (estimate.DEFAULT_GPU if config.train.placement.num_gpus > 0 else None)
    text, fits = estimate.report(config, gpu, basis)
    print(text)
    return int(not fits)


def _diff(arguments: argparse.Namespace) -> int:
    from alpaca_ray.train import diff

    made = (diff.make if arguments.action == "make" else diff.recover)(
        arguments.base, arguments.source, Path(arguments.out)
    )
    print(f"{made.directory}: {made.num_tensors} tensors; SHA-256 of the tuned model {made.fingerprint}")
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "doctor": _doctor,
    "demo": _demo,
    "down": _down,
    "estimate": _estimate,
    "diff": _diff,
}


if __name__ == "__main__":
    sys.exit(main())
