"""The laws of the house (docs/architecture.md), read off the source with `ast`."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    p.relative_to(ROOT).as_posix() for folder in ("alpaca_ray", "jobs") for p in (ROOT / folder).rglob("*.py")
)

RAY_FILES = {
    "alpaca_ray/provider/gate_actor.py",
    "alpaca_ray/provider/pool.py",
    "alpaca_ray/generate/dataset.py",
    "alpaca_ray/generate/novelty_shards.py",
    "alpaca_ray/train/elastic.py",
    "alpaca_ray/train/trainer.py",
    "alpaca_ray/train/worker.py",
    "alpaca_ray/evaluate/dataset.py",
    "alpaca_ray/serve/app.py",
    "alpaca_ray/serve/engine_metrics.py",
    "alpaca_ray/serve/lint.py",
    "alpaca_ray/serve/listening.py",
    "alpaca_ray/serve/monitor.py",
}
RAY_ROOMS = ("alpaca_ray/cluster/", "jobs/")
TORCH_FILES = re.compile(
    r"alpaca_ray/(train/.*|serve/(\w+_engine|step|sampling|decoder|llama|attention|linear)|evaluate/loss"
    r"|safety/watermark|models)\.py"
)
# A room may import rooms of a lower level only; config and schema share the lowest.
LEVELS = {
    "config": 0, "schema": 1, "settings": 1, "yaml_lines": 1,
    "prompts": 2, "artifacts": 2, "models": 2, "inputs": 3, "provider": 3, "safety": 3,
    "generate": 4, "train": 4, "evaluate": 4, "serve": 4, "web": 4, "cluster": 4, "doctor": 3,
    "demo": 5, "lint": 5, "cli": 6, "jobs": 7,
}  # fmt: skip
STAGES = {"generate", "train", "evaluate", "serve"}
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base"}
EFFECTS_AT_IMPORT = ("os.environ", "os.getenv", "os.makedirs", "logging.basicConfig", "mkdir", "ray.init")


def parse(path: str, root: Path = ROOT) -> ast.Module:
    return ast.parse((root / path).read_text(encoding="utf-8"), filename=path)


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported, inside functions and by importlib too; not those for type checkers only."""
    for node in walk_run(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            yield (ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else "a computed name")


def walk_run(node: ast.AST) -> Iterator[ast.AST]:
    """ast.walk without the bodies of `if TYPE_CHECKING:`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield from walk_run(child)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "alpaca_ray" and len(parts) > 1 else parts[0]


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def ours(path: str, root: Path = ROOT) -> list[str]:
    return [name for name in imports(parse(path, root)) if name.split(".")[0] in ("alpaca_ray", "jobs")]


def ray_imports(path: str, root: Path = ROOT) -> list[str]:
    if path in RAY_FILES or path.startswith(RAY_ROOMS):
        return []
    return [name for name in imports(parse(path, root)) if name.split(".")[0] == "ray"]


def wrong_arrows(path: str, root: Path = ROOT) -> list[str]:
    here = room(module_name(path))
    wrong = []
    for name in ours(path, root):
        there = room(name)
        if there == here or name == "alpaca_ray.__version__":
            continue
        if LEVELS[there] >= LEVELS[here] or (here == "web" and there in STAGES):
            wrong.append(f"{path} imports {name}")
    return wrong


def import_cycle(paths: list[str], root: Path = ROOT) -> list[str]:
    modules = {module_name(path) for path in paths}
    graph = {}
    for path in paths:
        targets = {name if name in modules else name.rpartition(".")[0] for name in ours(path, root)}
        graph[module_name(path)] = (targets & modules) - {"alpaca_ray"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("path", SOURCES)
def test_ray_stays_at_the_edge(path: str) -> None:
    assert not ray_imports(path)


@pytest.mark.parametrize("path", SOURCES)
def test_arrows_point_down(path: str) -> None:
    assert not wrong_arrows(path)


def test_config_imports_nothing_of_ours() -> None:
    assert not ours("alpaca_ray/config.py")


def test_no_import_cycles() -> None:
    assert not import_cycle(SOURCES)


@pytest.mark.parametrize("path", [p for p in SOURCES if not TORCH_FILES.fullmatch(p)])
def test_torch_stays_in_its_rooms(path: str) -> None:
    assert not [name for name in imports(parse(path)) if name.split(".")[0] == "torch"]


def wrong_form(path: str, root: Path = ROOT) -> list[str]:
    limit = 40 if path.startswith("jobs/") else 350
    lines = len((root / path).read_text(encoding="utf-8").splitlines())
    wrong = [f"{path} says nothing by its name"] if Path(path).stem in BANNED_NAMES else []
    return wrong + ([f"{path} has {lines} lines, {limit} are allowed"] if lines > limit else [])


@pytest.mark.parametrize("path", SOURCES)
def test_names_and_lengths(path: str) -> None:
    assert not wrong_form(path)


@pytest.mark.parametrize("path", SOURCES)
def test_no_import_has_an_effect(path: str) -> None:
    statements = [
        node
        for node in parse(path).body
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom))
        and not (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))
    ]
    text = "\n".join(ast.unparse(node) for node in statements)
    assert not [effect for effect in EFFECTS_AT_IMPORT if effect in text]


@pytest.mark.parametrize("command", [["-c", "import alpaca_ray"], ["-m", "alpaca_ray.cli", "--help"]])
def test_light_commands_import_neither_torch_nor_ray(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"torch", "ray", "transformers"}


def write(root: Path, path: str, text: str) -> str:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)
    return path


def test_the_laws_catch_what_breaks_them(tmp_path: Path) -> None:
    inside_a_function = write(tmp_path, "alpaca_ray/generate/parse.py", "def f():\n    import ray\n")
    by_importlib = write(
        tmp_path, "alpaca_ray/generate/plan.py", "import importlib\nimportlib.import_module('ray.data')\n"
    )
    upward = write(tmp_path, "alpaca_ray/schema.py", "from alpaca_ray.generate.parse import f\n")
    sideways = write(tmp_path, "alpaca_ray/train/loop.py", "import alpaca_ray.generate.parse\n")
    there = write(tmp_path, "alpaca_ray/provider/a.py", "from alpaca_ray.provider import b\n")
    back = write(tmp_path, "alpaca_ray/provider/b.py", "from alpaca_ray.provider.a import x\n")

    assert ray_imports(inside_a_function, tmp_path) == ["ray"]
    assert ray_imports(by_importlib, tmp_path) == ["ray.data"]
    assert wrong_arrows(upward, tmp_path)
    assert wrong_arrows(sideways, tmp_path)
    assert import_cycle([there, back], tmp_path)
    assert wrong_form(write(tmp_path, "alpaca_ray/utils.py", ""), tmp_path)
    assert wrong_form(write(tmp_path, "jobs/train.py", "x = 1\n" * 41), tmp_path)
