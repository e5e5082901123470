"""Imports go one way, and `import kvfuse` stays quick."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kvfuse"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LAYERS = [line.split() for line in re.findall(r"```layers\n(.*?)```", PAGE, re.DOTALL)[0].splitlines()]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts != ("__init__.py",))


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in PACKAGE.rglob("*.py")}


def imports_of(path):
    """Modules of ours that a file imports, wherever in it: a name of a package counts as the package."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvfuse":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (name if name in MODULES else node.module for name in names)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def level_of(module):
    return LEVEL[module.split(".")[1]] if "." in module else 0


def test_every_part_has_a_layer():
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} == LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_its_own_layer_or_below(path):
    mine = module_of(path)
    above = [theirs for theirs in imports_of(path) if level_of(theirs) > level_of(mine)]
    assert above == []


def test_no_modules_import_each_other():
    """A package's `__init__` gathers names of its own modules, which may import each other through it."""
    graph = {module_of(path): set(imports_of(path)) for path in FILES if path.name != "__init__.py"}
    cycle = []
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = error.args[1]
    assert cycle == []


@pytest.mark.parametrize("command", ["import kvfuse", "import kvfuse.cli"])
def test_importing_does_not_load_the_heavy_libraries(command):
    check = (
        f"import sys; {command}; print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_a_name_that_is_not_public_is_an_attribute_error():
    import kvfuse

    with pytest.raises(AttributeError, match="no attribute"):
        kvfuse.no_such_name  # noqa: B018
