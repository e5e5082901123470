"""A recipe: one YAML file about a pair. Each command reads its own sections, and checks every key first."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from kvfuse.errors import RecipeError, first_line, nearest
from kvfuse.support.files import read_text


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
    """Read a YAML file, then ``key=value`` words, e.g. ``train.steps=100``; keys are not checked yet.

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
    """Set ``key=value`` words in a recipe's content. Raises RecipeError where a word has another form."""
    for word in overrides:
        path, found, value = word.partition("=")
        if not found:
            raise RecipeError(f"expected key=value, got {word!r}; write for example train.steps=100")
        # walk to the section before the last dot, adding those that are missing
        section, (*outer, key) = content, path.split(".")
        for name in outer:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise RecipeError(f"expected a section before the last dot of {word!r}, got a value; check the key")
        try:
            section[key] = yaml.load(value, RecipeLoader)
        except (ValueError, yaml.YAMLError) as error:
            raise RecipeError(f"expected a value in YAML in {word!r}, got: {_reason(error)}; correct it") from error


def check(content: dict[str, Any], kind: type[SectionT], foreign: Collection[str] = ()) -> SectionT:
    """Check every key and value of a recipe's content.

    Args:
        content: See :func:`read_recipe`.
        kind: The class that describes it.
        foreign: Keys of other commands, which are ignored.

    Raises:
        RecipeError: A key is unknown (the nearest is named) or missing, or a value is wrong.
    """
    try:
        return kind.model_validate({key: value for key, value in content.items() if key not in foreign})
    except ValidationError as error:
        raise RecipeError(_explain(error, kind, foreign)) from error


def unknown_key(key: str, known: Sequence[str]) -> RecipeError:
    """The error for an unknown key, naming the nearest."""
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


def _explain(error: ValidationError, kind: type[BaseModel], foreign: Collection[str]) -> str:
    """The first complaint of pydantic in one line."""
    first = error.errors()[0]
    path, got = first["loc"], first["input"]
    key = ".".join(map(str, path))
    # the kinds of errors that have a better advice than pydantic's
    if first["type"] == "extra_forbidden":
        known = [*_section_at(kind, path[:-1]).model_fields, *(foreign if len(path) == 1 else ())]
        return str(unknown_key(key, known))
    if first["type"] == "missing":
        return f"expected the key {key} in the recipe, got none; add it"
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        meant = nearest(str(got), choices)
        return f"expected {key} to be one of {', '.join(choices)}, got {got!r}; did you mean {meant!r}?"
    return f"expected {key} to be right ({first['msg'].lower()}), got {got!r}; correct it"


def _section_at(kind: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    """The section at a path of keys, through lists of sections and optional ones."""
    for key in path:
        if isinstance(key, str) and key in kind.model_fields:
            kind = next(iter(_sections_in(kind.model_fields[key].annotation)), kind)
    return kind


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The classes of sections in a type such as ``list[Section] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]
