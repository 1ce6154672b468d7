"""Modules must not need each other while they are loaded: which one is imported first must not matter."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


def list_modules(root: Path) -> dict[str, Path]:
    """Return dotted name -> file; a package is its ``__init__.py``."""
    files = {path.relative_to(root).with_suffix(""): path for path in root.glob("chatreid_plugin/**/*.py")}
    return {
        ".".join(name.parent.parts if name.name == "__init__" else name.parts): path for name, path in files.items()
    }


def iterate_imports(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield what runs as a module is loaded: imports in functions come later, those for type checkers never."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from iterate_imports([*node.body, *node.orelse])
        elif isinstance(node, ast.Try | ast.With):
            yield from iterate_imports(node.body)


def list_needed(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules that are loaded before this one, with their packages; its own are being loaded already."""
    package = module.split(".")[: None if path.name == "__init__.py" else -1]
    needed = set[str]()
    for node in iterate_imports(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module.split(".") if node.module else [])]
            names = [[*base, alias.name] for alias in node.names]
        else:
            names = [alias.name.split(".") for alias in node.names]
        needed |= {".".join(name[:depth]) for name in names for depth in range(1, len(name) + 1)}
    return {name for name in needed & known.keys() if name != module and not module.startswith(f"{name}.")}


def find_circle(root: Path) -> list[str]:
    """Return modules that need each other, the first one again at the end; empty if there are none."""
    modules = list_modules(root)
    try:
        TopologicalSorter({name: list_needed(name, path, modules) for name, path in modules.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_modules_need_no_module_that_needs_them() -> None:
    assert len(list_modules(ROOT)) > 100
    assert find_circle(ROOT) == []


@pytest.mark.parametrize("back", ["from . import b", "from .b.c import X", "import chatreid_plugin.b.c"])
def test_finds_a_circle_through_a_package(tmp_path: Path, back: str) -> None:
    package = tmp_path / "chatreid_plugin"
    (package / "b").mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "a.py").write_text(f"{back}\n", encoding="utf-8")
    (package / "b" / "__init__.py").write_text("from ..a import Y\n", encoding="utf-8")
    (package / "b" / "c.py").write_text("X = 1\n", encoding="utf-8")
    assert set(find_circle(tmp_path)) == {"chatreid_plugin.a", "chatreid_plugin.b"}
    (package / "a.py").write_text(f"def later():\n    {back}\n", encoding="utf-8")
    assert find_circle(tmp_path) == []
