"""One section of a config, checked against the table of its keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from memplan.answers import Code, Finding
from memplan.configs.keys import Key
from memplan.errors import SpecError, UnsupportedError, did_you_mean, short

__all__ = ["Section", "quoted"]


class Section:
    """Reads a section's keys by name, with the values that the library would see.

    Args:
        values: the section as written.
        keys: its table.
        library: who reads it, for messages.
        source: the file.
        path: of the section in the file; empty is the top.
        lenient: the library ignores keys that it does not know, and memplan those that resemble no other.
        automatic: whether the library drops ``"auto"`` for its own default, as DeepSpeedConfigModel does.
        findings: where a key that is not known is put, and then left out; without it is an error.
        elsewhere: keys of other sections, and these sections: one that stands here is a finding.

    Raises SpecError for values that are not a mapping, a key that is not known, or a value of another type.
    """

    def __init__(
        self,
        values: object,
        keys: Mapping[str, Key],
        *,
        library: str,
        source: str,
        path: str = "",
        lenient: bool = False,
        automatic: bool = True,
        findings: list[Finding] | None = None,
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        self._elsewhere = elsewhere or {}
        self.reader, self.source, self.path = library, source, path
        self.ignored: list[str] = []
        self._findings = findings
        self._keys = keys
        if not isinstance(values, Mapping):
            raise SpecError.at(self.name(), values, f"is not an object, which {library} needs", "Write {...}.")
        self._values = {name: value for name, value in values.items() if self._known(str(name), value, lenient)}
        self.raw: Mapping[str, Any] = dict(self._values)
        self._values = {
            name: self._taken(name, value)
            for name, value in self._values.items()
            if not (automatic and isinstance(value, str) and value == "auto" and name in keys)
        }

    def name(self, key: str = "") -> str:
        """The path of a key, as messages name it."""
        inside = ".".join(short(part) for part in (self.path, key) if part)
        return f"{self.source}: {inside}" if inside else self.source

    def wrong(self, key: str, problem: str, remedy: str) -> SpecError:
        """Return (not raise) the error for a key."""
        return SpecError.at(self.name(key), self.raw.get(key), problem, remedy)

    def get(self, key: str, default: Any = None) -> Any:
        """The value that the library uses, or ``default`` where the file leaves it open."""
        return self._values.get(key, default)

    def has(self, key: str) -> bool:
        """Whether the file says something other than ``auto``."""
        return key in self._values

    def is_auto(self, key: str) -> bool:
        """Whether the file leaves the key to who fills in ``auto``."""
        value = self.raw.get(key)
        return isinstance(value, str) and value == "auto"

    def refuse_unmodelled(self, stage: int | None = None, but: Iterable[str] = ()) -> None:
        """Raise UnsupportedError for a key whose value changes memory in a way that is not modelled."""
        for name, value in self._values.items():
            key = self._keys[name]
            modelled = not key.only or any(_same(value, each) for each in key.only)
            if modelled or name in but or (stage is not None and stage not in key.stages):
                continue
            raise UnsupportedError(f"{self.name(name)}: {quoted(value)} is not modelled: {key.why}. Leave it out.")

    def _known(self, name: str, value: object, lenient: bool) -> bool:
        if name in self._keys:
            return True
        comment = name.startswith(("_", "#", "/")) or "comment" in name.lower()
        if lenient and self._findings is not None and name in self._elsewhere:
            self._add("misplaced-key", name, value, "it ignores it", f"Put it into {self._elsewhere[name]}.")
            return False
        if lenient and (comment or not _is_slip(name, self._keys)):
            self.ignored.append(name)
            return False
        problem = f"is given to a key that {self.reader} does not have"
        if lenient:
            problem += ", and would ignore"
        remedy = did_you_mean(name, self._keys)
        if self._findings is None:
            raise SpecError.at(self.name(name), value, problem, remedy)
        code: Code = "misspelt-key" if lenient else "unknown-key"
        self._add(code, name, value, "it ignores it" if lenient else "it does not start", remedy)
        return False

    def _add(self, code: Code, name: str, value: object, ending: str, remedy: str) -> None:
        message = f"{quoted(value)} is given to a key that {self.reader} does not have here: {ending}."
        found = Finding(code=code, severity="error", path=self.name(name), message=message, remedy=remedy)
        if self._findings is not None and found not in self._findings:  # a section may be read more than once
            self._findings.append(found)

    def _taken(self, name: str, value: object) -> Any:
        try:
            return _adapter(self._keys[name].takes).validate_python(value)
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            raise SpecError.at(self.name(name), value, f"is refused by {self.reader}", f"{message}.") from None


_SLIP = 0.8
"""How alike (``difflib``'s ratio) a name is to the one that is meant. What LLaMA-Factory's files hold beside
``comms_logger``, ``comms_config``, has 0.67; ``train_micro_batch_size``, which DeepSpeed ignores, 0.85."""


def _is_slip(name: str, keys: Iterable[str]) -> bool:
    return bool(difflib.get_close_matches(name.lower(), [key.lower() for key in keys], n=1, cutoff=_SLIP))


def _same(value: object, other: object) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def quoted(value: object) -> str:
    """A value as JSON has it, short."""
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits, which Python does not write out
        text = f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


@lru_cache(maxsize=64)
def _adapter(takes: Any) -> TypeAdapter[Any]:
    return TypeAdapter(takes)
