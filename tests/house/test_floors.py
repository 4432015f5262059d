"""The house stands: imports point down only, there are no cycles, and the light doors stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
PACKAGE = SRC / "llmo"

# A package may import those of a lower number, and of its own number only where LATERAL says so.
FLOORS = {
    "doors": 60,
    "system": 50,
    "searches": 45,
    "serve": 40,
    "guard": 30,
    "watch": 30,
    "kernel": 20,
    "preflight": 19,
    "classic": 19,
    "verify": 18,
    "compression": 17,
    "tuning": 17,
    "training": 16,
    "engines": 15,
    "tasks": 14,
    "data": 13,
    "pipeline": 10,
    "store": 10,
}
GROUND = {
    "": 0, "errors": 0, "types": 0, "settings": 0, "context": 0, "plugins": 0, "operations": 0, "files": 0, "naming": 0,
    "sources": 0, "specs": 0, "jobspecs": 0, "specbase": 0, "searchspec": 0, "methods": 0, "specfile": 0, "api": 0,
    "code": 0, "scratch": 0, "exports": 0, "hardware": 0,
}  # fmt: skip
WORKSHOPS = {
    *("data", "tasks", "engines", "training", "tuning", "compression", "verify", "preflight", "classic", "pipeline"),
}
HEAVY = {"torch", "transformers", "pyarrow", "polars", "onnxruntime", "onnx", "peft"}
LIGHT = {"store", "kernel", "guard", "watch", "system", "pipeline", *GROUND}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(SRC).with_suffix("").parts)
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(name: str, path: Path, *, top_only: bool) -> list[str]:
    """The modules a file imports; names under TYPE_CHECKING are no imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = []
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        nodes.append(node)
        waiting.extend(ast.iter_child_nodes(node))
    found: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide the floor"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def unit(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def floor(module: str) -> int:
    name = unit(module)
    if name in FLOORS:
        return FLOORS[name]
    assert name in GROUND or name[:1].isupper() or name.startswith("__"), f"'{name}' stands on no floor: give it one"
    return 0


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_point_down(name: str, path: Path) -> None:
    for target in imports(name, path, top_only=False):
        if target.split(".")[0] != "llmo" or unit(target) == unit(name) or unit(name) == "":
            continue
        if floor(name) == 0 and floor(target) == 0:
            continue
        assert floor(target) < floor(name), f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})"
        if unit(name) in WORKSHOPS:
            assert unit(target) not in {"store", "kernel"}, f"the workshop {name} imports {target}"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_the_control_plane_is_light(name: str, path: Path) -> None:
    if unit(name) not in LIGHT:
        return
    heavy = {target.split(".")[0] for target in imports(name, path, top_only=True)} & HEAVY
    assert not heavy, f"{name} imports {heavy}"


def test_no_cycles() -> None:
    known = {name for name, _ in modules()}
    graph: dict[str, set[str]] = defaultdict(set)
    for name, path in modules():
        for imported in imports(name, path, top_only=True):
            target = imported
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name and not name.startswith(target + "."):
                graph[name].add(target)
    state: dict[str, int] = {}

    def visit(node: str, trail: list[str]) -> None:
        if state.get(node) == 2:
            return
        assert state.get(node) != 1, f"import cycle: {' -> '.join([*trail[trail.index(node) :], node])}"
        state[node] = 1
        for target in sorted(graph[node]):
            visit(target, [*trail, node])
        state[node] = 2

    for node in sorted(graph):
        visit(node, [])


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return {line.split(".")[0] for line in done.stdout.splitlines()}


def test_importing_llmo_imports_nothing_heavy() -> None:
    assert not loaded_by("import llmo") & {
        *HEAVY,
        "numpy",
        "pydantic",
        "sqlalchemy",
        "httpx",
        "rich",
        "typer",
        "fastapi",
    }


@pytest.mark.parametrize(
    "statement", ["import llmo.doors.cli", "import llmo.system", "from llmo import Client", "import llmo.doors.api"]
)
def test_doors_do_not_import_torch(statement: str) -> None:
    assert not loaded_by(statement) & {"torch", "transformers", "onnxruntime", "pyarrow", "polars"}


def test_every_public_name_is_there() -> None:
    import llmo

    for name in llmo.__all__:
        assert callable(getattr(llmo, name)), name


def test_the_sdk_names_are_functions_even_after_every_module_is_imported() -> None:
    code = (
        "import importlib, pkgutil, llmo\n"
        "for m in pkgutil.walk_packages(llmo.__path__, 'llmo.'):\n"
        "    if '__main__' in m.name or 'migrations' in m.name: continue\n"
        "    try: importlib.import_module(m.name)\n"
        "    except ModuleNotFoundError as error: assert error.name == 'triton', error  # only a CUDA torch has it\n"
        "assert callable(llmo.train) and callable(llmo.compress) and callable(llmo.deploy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
