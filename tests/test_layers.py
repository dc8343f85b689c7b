"""Imports point one way: a module imports only what stands above it in docs/architecture.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "memplan"


def _layers() -> list[set[str]]:
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.split("## Layers of imports")[1].split("##")[0]
    paragraph = section.strip().split("\n\n")[0].split(": ", 1)[1]
    return [set(names.split()) for names in re.findall(r"`([a-z_ ]+)`", paragraph)]


def _imports(module: Path) -> Iterator[str]:
    """Top-level names below memplan that are imported when ``module`` is, not within its functions."""
    nodes: list[ast.AST] = [ast.parse(module.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            package, _, rest = node.module.partition(".")
            if package == "memplan":
                yield from [rest.split(".")[0]] if rest else [alias.name for alias in node.names]
        elif not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)


LAYERS = _layers()
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def test_every_module_has_its_layer() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__", "__main__"} == set(RANK)


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(module: Path) -> None:
    layer = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer in RANK:
        below = {name for name in _imports(module) if name in RANK and RANK[name] > RANK[layer]}
        assert not below, f"imports {below}, which stand below {layer}"
