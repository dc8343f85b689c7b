"""From a file to plain values: JSON or YAML, of a bounded size, without tags, aliases or duplicate keys."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memplan.errors import SpecError

__all__ = [
    "ANCESTORS",
    "LARGEST_FILE",
    "is_there",
    "parse_mapping",
    "read_mapping",
    "read_text",
    "refuse_outside",
]

LARGEST_FILE = 2**20
"""Bytes: engine configs have a few KiB."""
ANCESTORS = 6
"""Folders above a file in which what it names is looked for, its own being the first."""
MOST_KEYS = 500
"""In one section. TrainingArguments have about 120 fields, with all of which a name that is not known is compared."""
MOST_VALUES = 20_000
"""In a file: PyYAML takes some 0.1 ms for each."""
DEEPEST = 50
"""Levels: DeepSpeed's configs have four. PyYAML's time grows with their square."""


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; a name that no disk takes, which ``Path.exists`` raises for, is not."""
    return os.path.exists(path)  # noqa: PTH110


def read_mapping(path: str | os.PathLike[str], field: str = "engine_config") -> tuple[dict[str, Any], bool]:
    """Return the object in a JSON or YAML file, and whether it is YAML. Raises SpecError, naming the file.

    ``field`` is what messages call a path that no text can be read from.
    """
    text = read_text(Path(path), field)
    source = str(path)
    is_yaml = _is_yaml(text, source)
    return parse_mapping(text, source), is_yaml


def _is_yaml(text: str, source: str) -> bool:
    return not text.lstrip().startswith("{") and not source.endswith(".json")


def parse_mapping(text: str, source: str) -> dict[str, Any]:
    """Return the object in the text of a JSON or YAML file. Raises SpecError, naming ``source``."""
    is_yaml = _is_yaml(text, source)
    try:
        data = _yaml(text, source) if is_yaml else _json(text, source)
    except RecursionError:
        raise SpecError(f"{source}: nested too deeply. A config has a few levels.") from None
    if not isinstance(data, dict):
        kind = {list: "a list", str: "text", type(None): "nothing", bool: "a boolean"}.get(type(data), "a number")
        remedy = "Give a JSON or a YAML of them, or the command of a run, which begins with torchrun or the like."
        raise SpecError(f"{source}: holds {kind}, where a config holds keys and values. {remedy}")
    for key in data:
        if not isinstance(key, str):
            raise SpecError.at(source, key, "is a key that is not text", "Write the name of a setting.")
    return data


def read_text(path: Path, field: str = "engine_config") -> str:
    """Return the text of a file that is small enough for a config. Raises SpecError."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise SpecError(f"{field}: {str(path)!r} is a directory. Give the file in it.")
        if not stat.S_ISREG(status.st_mode):
            raise SpecError(f"{field}: {str(path)!r} is not a regular file. Give a JSON or YAML file.")
        content = b""
        if status.st_size <= LARGEST_FILE:
            with path.open("rb") as file:
                content = file.read(LARGEST_FILE + 1)  # bounded: the file may be growing
    except FileNotFoundError:
        raise SpecError.at(field, str(path), "does not exist", "Give the path of a file.") from None
    except SpecError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        problem = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        raise SpecError.at(field, str(path), problem, "Give a file that you may read.") from None
    size = max(status.st_size, len(content))
    if size > LARGEST_FILE:
        raise SpecError(f"{field}: {str(path)!r} has {size} bytes, too many for a config. Give the config.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise SpecError(
            f"{path}: is not UTF-8 text: byte {error.start} is {byte:#04x}. Give a JSON or YAML file."
        ) from None


def refuse_outside(path: Path, folder: Path, where: str, roots: Iterable[Path] = ()) -> None:
    """Raise SpecError for a path, named in a file of ``folder``, that leads elsewhere, by a link or otherwise.

    A config is trusted to lead to the folder that memplan is started in, to its own, to the repository around it and to
    ``roots``: who checks what others have written is not led to what else is there.
    """
    allowed = [Path(), folder, *roots, *_repository(folder)]
    try:
        real = path.resolve()
        inside = any(real.is_relative_to(root.resolve()) for root in allowed)
    except (OSError, RuntimeError, ValueError):  # a link to itself, a null byte
        inside = False
    if not inside:
        remedy = "Copy it beside the file that names it, or start memplan in a folder that both are in."
        raise SpecError.at(where, str(path), "leads elsewhere, where memplan does not follow a config", remedy)


def _repository(folder: Path) -> list[Path]:
    """The repository that a folder is in, if it is in one."""
    above = [folder.absolute(), *folder.absolute().parents][:ANCESTORS]
    return [each for each in above if (each / ".git").exists()][:1]


def _json(text: str, source: str) -> Any:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_many(len(found), source)
        # DeepSpeed refuses them (config_utils.dict_raise_error_on_duplicate_keys); json alone would take the last.
        _refuse_duplicates((key for key, _ in found), source)
        return dict(found)

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        remedy = "It ends too early." if error.pos >= len(text.rstrip()) else "Correct it there."
        raise SpecError(f"{source}: is not JSON: {where}. {remedy}") from None
    except SpecError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise SpecError(f"{source}: is not JSON that can be read: {error}. Correct it there.") from None


def _yaml(text: str, source: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain values only, as accelerate loads them; what could hide or repeat a value is refused."""

        depth, values = 0, 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise SpecError(f"{source}: has an alias (*), which memplan does not follow. Write the value out.")
            self.depth, self.values = self.depth + 1, self.values + 1
            if self.depth > DEEPEST:
                raise RecursionError
            if self.values > MOST_VALUES:
                raise SpecError(f"{source}: holds more than {MOST_VALUES} values, too many for a config. {_GIVE}")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _refuse_many(len(node.value), source)
            _refuse_duplicates((str(key.value) for key, _ in node.value), source)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = str(getattr(error, "problem", None) or error).split("\n")[0]
        raise SpecError(f"{source}: is not plain YAML: {problem}{where}. Correct it there.") from None
    except (
        ValueError,
        OverflowError,
    ) as error:  # a date that does not exist, an integer of thousands of digits, 1:1:1.5
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{source}: is not YAML that can be read: {error}. Correct it there.") from None


_GIVE = "Give the config of a run."


def _refuse_many(keys: int, source: str) -> None:
    if keys > MOST_KEYS:
        raise SpecError(f"{source}: has a section of {keys} keys, too many for a config. {_GIVE}")


def _refuse_duplicates(keys: Iterable[str], source: str) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise SpecError.at(source, key, "is given twice", "Keep the one that is meant.")
        seen.add(key)
