"""`alpaca-ray`: doctor, demo, down, runs, estimate, diff, detect, lint, cluster, keys; and how jobs begin and end."""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from alpaca_ray import __version__
from alpaca_ray.config import UserError

if TYPE_CHECKING:
    from alpaca_ray.artifacts import Stage  # pyarrow: not for `--help`
    from alpaca_ray.config import RunConfig
    from alpaca_ray.train.estimate import Basis


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
    runs = commands.add_parser("runs", help="the runs of a storage path: stage, state, counts, cost, where")
    runs.add_argument("storage_path", help="as jobs take it: a directory, or a URI such as s3://bucket/runs")
    runs.add_argument("--json", action="store_true", help="all that is known, as JSON")
    runs.add_argument("--cluster", type=Path, help="a cluster.yaml: what each run did cost on its nodes")
    runs.add_argument("--prices", type=Path, help="of instances, as for `estimate`")
    estimate = commands.add_parser(
        "estimate",
        help="memory, time and cost of a run before it starts; exit code 1 if training cannot fit",
        epilog="RECIPE or --config FILE, and overrides such as --train.micro-batch-size 2, as jobs take them",
        allow_abbrev=False,
    )
    estimate.add_argument("--gpu", help="a type such as a100-80gb (default: that, or none for a recipe without GPUs)")
    estimate.add_argument("--cluster", type=Path, help="a cluster.yaml: dollars and hours of every stage on it")
    estimate.add_argument("--prices", type=Path, help="of instances, before those of alpaca_ray/cluster/prices.yaml")
    estimate.add_argument("--mfu", type=float, help="share of the GPU's peak that useful tokens get (default: 0.4)")
    estimate.add_argument("--tokens-per-example", type=float, help="prompt and answer (default: 139, Alpaca's)")
    diff = commands.add_parser("diff", help="a tuned model as its exact difference from a base, and back")
    actions = diff.add_subparsers(dest="action", required=True)
    for action, given, what in (("make", "--tuned", "tuned model"), ("recover", "--diff", "directory of the diff")):
        verb = actions.add_parser(action)
        verb.add_argument("--base", required=True, help="the base model: a directory, a URI or a hub id")
        verb.add_argument(given, required=True, dest="source", help=f"the {what}")
        verb.add_argument("--out", required=True, help="a directory that does not exist yet")
    lint = commands.add_parser("lint", help="every field of cluster.yaml, serve_config.yaml and recipes; exit code 1")
    lint.add_argument("files", nargs="*", help="of any kind (default: the two here, and the recipes that ship)")
    _add_cluster(commands.add_parser("cluster", help="cluster.yaml's other forms, and whether they are valid"))
    _add_keys(commands.add_parser("keys", help="make an API key of the server"))
    _add_detect(commands.add_parser("detect", help="whether a text carries the watermark of a key"))
    return parser


def _add_cluster(cluster: argparse.ArgumentParser) -> None:
    from alpaca_ray.cluster.forms import add_parsers

    add_parsers(cluster)


def _add_keys(keys: argparse.ArgumentParser) -> None:
    make = keys.add_subparsers(dest="action", required=True).add_parser(
        "make", help="the key goes to standard error, once; the line for the key file to standard output"
    )
    make.add_argument("name", help="whose it is, as logs show it")
    make.add_argument("--scopes", nargs="+", required=True, help="generate, detect, admin")
    make.add_argument("--requests-per-minute", type=int, help="(default: no limit)")
    make.add_argument("--tokens-per-minute", type=int, help="(default: no limit)")


def _add_detect(detect: argparse.ArgumentParser) -> None:
    detect.add_argument("file", nargs="?", default="-", help="the text, UTF-8 (default: standard input)")
    detect.add_argument("--model", required=True, help="the model that was served: its tokenizer reads the text")
    detect.add_argument("--key-env", default="ALPACA_RAY_WATERMARK_KEY", help="variable of the key (%(default)s)")
    detect.add_argument("--key-file", type=Path, help="a file that holds the key, in place of the variable")
    detect.add_argument("--allow-public-key", action="store_true", help="accept the published default key")
    detect.add_argument("--gamma", type=float, default=0.25, help="as the server has it (default: %(default)s)")
    detect.add_argument("--delta", type=float, default=2.0, help="as the server has it (default: %(default)s)")
    detect.add_argument("--ids", action="store_true", help="the file holds token ids, a JSON list, in place of text")
    detect.add_argument("--json", action="store_true", help="one line of JSON")


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


def _runs(arguments: argparse.Namespace) -> int:
    from alpaca_ray.cluster import runs

    if arguments.cluster is not None:
        print(runs.costs(arguments.storage_path, arguments.cluster, arguments.prices))
        return 0
    states = runs.states(arguments.storage_path, time.time())
    print(runs.to_json(states) if arguments.json else runs.render(states))
    return 0


def _estimate(arguments: argparse.Namespace) -> int:
    from alpaca_ray.settings import load_config
    from alpaca_ray.train import estimate

    given = arguments.overrides
    config = load_config(["--recipe", *given] if given and not given[0].startswith("-") else given)
    asked = {name: getattr(arguments, name) for name in ("mfu", "tokens_per_example")}
    basis = estimate.Basis(**{name: value for name, value in asked.items() if value is not None})
    gpu = arguments.gpu or (estimate.DEFAULT_GPU if config.train.placement.num_gpus > 0 else None)
    if arguments.cluster is None:
        text, fits = estimate.report(config, gpu, basis)
        print(text)
        return int(not fits)
    return _estimate_on_cluster(arguments, config, basis)


def _estimate_on_cluster(arguments: argparse.Namespace, config: "RunConfig", basis: "Basis") -> int:
    from alpaca_ray.cluster import pricing
    from alpaca_ray.train import estimate

    prices = pricing.load_prices(arguments.prices)
    groups, idle_h = pricing.load_groups(arguments.cluster)
    group = pricing.group_of(groups, config.train.placement, "train")
    gpu = arguments.gpu or (prices.of(group.instance_type).gpu if group else None)
    text, fits = estimate.report(config, gpu, basis)
    time_s = estimate.estimate(config, estimate.gpu_named(gpu) if gpu else None, basis).time_s
    costs = pricing.estimate(config, groups, idle_h, prices, None if time_s is None else time_s / 3600)
    print(f"{text}\n\n{pricing.render(costs, prices, config.generate.mode)}")
    return int(not fits)


def _diff(arguments: argparse.Namespace) -> int:
    from alpaca_ray.train import diff

    made = (diff.make if arguments.action == "make" else diff.recover)(
        arguments.base, arguments.source, Path(arguments.out)
    )
    print(f"{made.directory}: {made.num_tensors} tensors; SHA-256 of the tuned model {made.fingerprint}")
    return 0


def _detect(arguments: argparse.Namespace) -> int:
    from alpaca_ray.safety.watermark_key import read_key

    key = read_key(arguments.key_env, arguments.key_file, arguments.allow_public_key)
    text = _read_text(arguments.file)  # what is missing is said before torch is loaded
    ids = _token_ids(text, arguments.file) if arguments.ids else None
    from alpaca_ray.safety import watermark

    mark = watermark.Watermark(
        key.get_secret_value(),
        arguments.gamma,
        arguments.delta,
        vocab_size=watermark.vocab_size(arguments.model),
        allow_public_key=arguments.allow_public_key,
    )
    found = watermark.detect_text(text, arguments.model, mark) if ids is None else mark.detect(ids)
    print(found.to_json() if arguments.json else found.render())
    return 0


def _read_text(file: str) -> str:
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{'standard input' if file == '-' else file} is not UTF-8: convert it first") from None


def _token_ids(text: str, file: str) -> list[int]:
    try:
        ids = json.loads(text)
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise UserError(f"{file} holds no token ids: with --ids it has to be a JSON list of whole numbers")
    return ids


def _lint(arguments: argparse.Namespace) -> int:
    from alpaca_ray.lint.files import default_files, lint_files, unchecked

    files = [Path(file) for file in arguments.files] or default_files(Path.cwd())
    problems = lint_files(files, os.environ)
    print("\n".join(problems) if problems else f"{', '.join(map(str, files))}: nothing is wrong")
    if (gap := unchecked(files)) is not None:
        print(f"note: {gap}", file=sys.stderr)
    return int(bool(problems))


def _keys(arguments: argparse.Namespace) -> int:
    from alpaca_ray.serve.keys import make_key

    key = make_key(arguments.name, arguments.scopes, arguments.requests_per_minute, arguments.tokens_per_minute)
    print(f"the key, shown this once: {key.secret}", file=sys.stderr, flush=True)
    print(key.line)
    return 0


def _cluster(arguments: argparse.Namespace) -> int:
    from alpaca_ray.cluster import forms

    return forms.run(arguments)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "doctor": _doctor,
    "demo": _demo,
    "down": _down,
    "runs": _runs,
    "estimate": _estimate,
    "diff": _diff,
    "detect": _detect,
    "lint": _lint,
    "cluster": _cluster,
    "keys": _keys,
}


if __name__ == "__main__":
    sys.exit(main())
