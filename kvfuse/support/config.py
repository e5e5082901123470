"""A recipe: one YAML file about a pair, of which every command reads its own sections, each key checked before anything is loaded."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from kvfuse.errors import RecipeError, first_line, nearest
from kvfuse.support.files import read_text


class Section(BaseModel):
    """A part of a recipe; keys that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RecipeLoader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice in one mapping: YAML itself takes the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Called by YAML for every mapping, before merge keys (``<<``) are filled in."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise yaml.YAMLError(f"the key {key.value!r} twice, in lines {lines[name]} and {line}")
                lines[name] = line
        return node


SectionT = TypeVar("SectionT", bound=Section)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file and the ``key=value`` words after it, e.g. ``train.steps=100``, without checking the keys.

    Raises:
        RecipeError: The file is missing or no YAML of keys and values, a key stands twice in it, or a word is no
            ``key=value``.
    """
    try:
        content = yaml.load(read_text(Path(path)), RecipeLoader) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"expected a recipe in YAML at {path}, got: {_reason(error)}; check the file") from error
    if not isinstance(content, dict):
        raise RecipeError(f"expected {path} to hold keys and values, got a {type(content).__name__}; see recipes/")
    override(content, overrides)
    return content


def override(content: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set ``key=value`` words in a recipe's content. Raises RecipeError where a word is none."""
    for word in overrides:
        key, found, value = word.partition("=")
        if not found:
            raise RecipeError(f"expected key=value, got {word!r}; write for example train.steps=100")
        try:
            parsed = yaml.load(value, RecipeLoader)
        except (ValueError, yaml.YAMLError) as error:
            raise RecipeError(f"expected a value in YAML in {word!r}, got: {_reason(error)}; correct it") from error
        _set(content, key.split("."), parsed, word)


def check(content: dict[str, Any], kind: type[SectionT], foreign: Collection[str] = ()) -> SectionT:
    """A recipe's content as what it says, every key and value checked.

    Args:
        content: See :func:`read_recipe`.
        kind: What to read it as.
        foreign: Keys that other commands read, which are passed over.

    Raises:
        RecipeError: A key is unknown (the nearest is named) or missing, or a value is wrong.
    """
    try:
        return kind.model_validate({key: value for key, value in content.items() if key not in foreign})
    except ValidationError as error:
        raise RecipeError(_explain(error, kind, foreign)) from error


def unknown_key(key: str, known: Sequence[str]) -> RecipeError:
    """The complaint about an unknown key, naming the nearest."""
    return RecipeError(
        f"expected a key of the recipe, got the unknown {key!r}; did you mean {nearest(key.split('.')[-1], known)!r}?"
    )


def _reason(error: Exception) -> str:
    """One line about a file that cannot be read; YAML's own first line names neither the fault nor its line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return first_line(error)
    line = error.problem_mark.line + 1
    if "'\\t'" in str(error.problem):
        return f"a tab in line {line}, where YAML takes spaces alone"
    return f"{error.problem} in line {line}"


def _set(content: dict[str, Any], keys: list[str], value: Any, word: str) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise RecipeError(f"expected a section before the last dot of {word!r}, got a value; check the key")
    content[keys[-1]] = value


def _explain(error: ValidationError, kind: type[BaseModel], foreign: Collection[str]) -> str:
    """The first complaint of pydantic in one line."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [*_section_at(kind, first["loc"][:-1]).model_fields, *(foreign if len(first["loc"]) == 1 else ())]
        return str(unknown_key(key, known))
    if first["type"] == "missing":
        return f"expected the key {key} in the recipe, got none; add it"
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        got = first["input"]
        return f"expected {key} to be one of {', '.join(choices)}, got {got!r}; did you mean {nearest(str(got), choices)!r}?"
    return f"expected {key} to be right ({first['msg'].lower()}), got {first['input']!r}; correct it"


def _section_at(kind: type[BaseModel], place: Sequence[str | int]) -> type[BaseModel]:
    """The section that a complaint's place is in: the fields on the way, through lists and options of sections."""
    for key in place:
        if isinstance(key, str) and key in kind.model_fields:
            kind = next(iter(_sections_in(kind.model_fields[key].annotation)), kind)
    return kind


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]
