"""Imports go one way, and `import kvfuse` stays quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kvfuse"
LAYERS = [
    {"errors"},
    {"plugins", "phases", "recipe", "processes", "growing_cache", "spans", "layer_alignment", "reencode", "products"},
    {"kv_cache"},
    {"chat"},
    {"reading"},
    {"message_axis"},
    {"prefill", "token_alignment", "fusers"},
    {"rotation", "response", "captured", "shelf"},
    {"language_model", "fuse", "published"},
    {"follow", "checkpoint", "prefix_store"},
    {"decode"},
    {"model", "alignment_view", "plots"},
    {"testing", "methods"},
    {"training", "evaluation"},
    {"demo"},
    {"analysis"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts != ("__init__.py",))


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvfuse."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_below_or_its_own_folder(path):
    mine = part_of(path)
    for theirs in imports_of(path):
        assert theirs == mine or LEVEL[theirs] < LEVEL[mine], f"{mine} imports {theirs}"


@pytest.mark.parametrize("command", ["import kvfuse", "import kvfuse.cli"])
def test_importing_does_not_load_the_heavy_libraries(command):
    check = (
        f"import sys; {command}; print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_public_names_are_there():
    import kvfuse

    assert all(getattr(kvfuse, name).__name__ == name for name in kvfuse.__all__)
    with pytest.raises(AttributeError, match="no attribute"):
        kvfuse.no_such_name  # noqa: B018
