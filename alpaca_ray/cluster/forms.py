"""`alpaca-ray cluster`: render, validate, up, down."""

import argparse
from pathlib import Path

from alpaca_ray.config import UserError


def add_parsers(cluster: argparse.ArgumentParser) -> None:
    actions = cluster.add_subparsers(dest="action", required=True)
    render = actions.add_parser("render", help="cluster.yaml's form for another target")
    render.add_argument("file", nargs="?", type=Path, default=Path("cluster.yaml"), help="(default: cluster.yaml)")
    render.add_argument("--target", required=True, choices=["gcp", "kuberay", "local"])
    render.add_argument("--out", type=Path, help="a directory; - prints (default: deploy/TARGET)")
    render.add_argument("--serve-config", type=Path, default=Path("serve_config.yaml"), help="(default: %(default)s)")
    render.add_argument("--num-cpus", type=int, help="of a local node at most (default: as in FILE)")
    render.add_argument("--gcs-port", type=int, default=6379, help="of the local head (default: %(default)s)")
    check = actions.add_parser(
        "validate", help="manifests against KubeRay's schemas, node settings against the clouds' models; 1 if wrong"
    )
    check.add_argument("files", nargs="*", type=Path, help="(default: cluster.yaml and what deploy/ has)")
    check.add_argument("--schemas", type=Path, help="directory with KubeRay's schemas or CRDs")
    up = actions.add_parser("up", help="the local twin: a head here, the groups as fake nodes under Ray's autoscaler")
    up.add_argument("--file", type=Path, default=Path("cluster.yaml"), help="(default: %(default)s)")
    up.add_argument("--num-cpus", type=int, help="of a node at most (default: as in FILE)")
    down = actions.add_parser("down", help="end the local twin and all its nodes")
    for verb in (up, down):
        verb.add_argument("--local", action="store_true", help="required: `ray up` and `ray down` are for the real one")
        verb.add_argument("--directory", type=Path, default=Path(".twin"), help="token, log (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit code."""
    return {"render": _render, "validate": _validate, "up": _up, "down": _down}[arguments.action](arguments)


def _render(arguments: argparse.Namespace) -> int:
    from alpaca_ray.cluster.render import read_sources, render
    from alpaca_ray.cluster.render_local import LocalScale

    scale = LocalScale(num_cpus=arguments.num_cpus, gcs_port=arguments.gcs_port)
    files = render(read_sources(arguments.file, arguments.serve_config, scale), arguments.target)
    if str(arguments.out) == "-":
        print("---\n".join(files.values()), end="")
        return 0
    directory = arguments.out or Path("deploy", arguments.target)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
        print(f"{directory / name}")
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from alpaca_ray.cluster.validate import read_schemas, validate

    schemas = read_schemas(arguments.schemas) if arguments.schemas else {}
    files = arguments.files or _default_files()
    found = []
    for file in files:
        try:
            found += validate(file, schemas)
        except UserError as error:  # one file that cannot be checked hides nothing about the others
            found.append(f"{file}: not checked: {error}")
    print("\n".join(found) if found else f"{', '.join(map(str, files))}: nothing is wrong")
    return int(bool(found))


def _default_files() -> list[Path]:
    manifests = sorted(Path("deploy", "kuberay").glob("*.yaml"))
    files = [
        file for file in (Path("cluster.yaml"), Path("deploy", "gcp", "cluster.yaml"), *manifests) if file.exists()
    ]
    if not files:
        raise UserError("there is no cluster.yaml here: name the files, or go to the checkout")
    return files


def _up(arguments: argparse.Namespace) -> int:
    if not arguments.local:
        raise UserError(f"for the twin on this machine add --local; the cluster itself: ray up {arguments.file}")
    from alpaca_ray.cluster import local, twin
    from alpaca_ray.cluster.render import read_definition

    directory = arguments.directory.absolute()
    cluster = local.running(directory)
    if cluster is not None:
        print(f"the twin of {directory} runs already: {twin.describe(cluster)}")
        return 0
    twin.down(directory)  # what a head that died has left
    definition = read_definition(arguments.file)
    cluster, most = twin.up(directory, definition, arguments.num_cpus), twin.most_nodes(definition)
    print(f"the twin is up: {twin.describe(cluster)}")
    if twin.limit(cluster) < most:
        print(f"note: memory for {twin.limit(cluster)} nodes at once; {arguments.file} lets there be {most}")
    return 0


def _down(arguments: argparse.Namespace) -> int:
    if not arguments.local:
        raise UserError("for the twin on this machine add --local; the cluster itself: ray down cluster.yaml")
    from alpaca_ray.cluster import twin

    directory = arguments.directory.absolute()
    if twin.down(directory):
        print(f"the twin of {directory} is down, and its nodes with it")
    else:
        print(f"no twin of {directory} is running")
    return 0
