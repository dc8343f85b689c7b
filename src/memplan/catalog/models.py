"""Models by hub id: the ``config.json`` values of checkpoints people fine-tune. The rows are in ``data/models``.

One file per family, and an index from every name to its family's file, so that a lookup reads two small files.
A row keeps the values that decide shapes, dtypes and operations, as the checkpoint's own ``config.json`` writes them
(``torch_dtype``, ``rope_scaling`` ...), and says where they were found.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from memplan.errors import suggest_names

__all__ = ["CatalogModel", "all_models", "build_index", "lookup", "nearest"]

_DATA = Path(__file__).with_name("data") / "models"
_INDEX = "index"


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """One checkpoint of the catalog."""

    id: str
    """Its hub id, also where it was looked up by another name."""
    config: dict[str, Any]
    """Values of its ``config.json``; the caller's own copy."""
    source: str
    """Where the values come from."""
    verified: bool
    """Whether an independent source confirms them: a copy of the config, a table of its sizes, or the exact count."""
    parameters_published: int | None
    """The exact number of parameters published for the class in ``architectures``, or None if none was found."""
    parameters_source: str | None
    """Where that number is published."""
    remote_code: str | None
    """Why transformers cannot build it without code from its repository, or None where it can."""
    aliases: tuple[str, ...]
    """Other hub ids whose config agrees in every value that decides a shape, a dtype or an operation."""


def lookup(id: str) -> CatalogModel | None:
    """Return the model of that hub id or alias, or None if the catalog has none; case is ignored.

    >>> model = lookup("gpt2")
    >>> model.id, model.config["n_embd"], model.parameters_published
    ('openai-community/gpt2', 768, 124439808)
    """
    name = id.strip().lower()
    family = _families().get(name)
    if family is None:
        return None
    return next(_model(row) for row in _rows(family) if name in _lower_names(row))


def nearest(id: str, n: int = 3) -> list[str]:
    """Return up to ``n`` names of the catalog that ``id`` begins or resembles, nearest first.

    An id without an organisation is compared with the part of each name behind it.

    >>> nearest("lama-2-70b", n=2), nearest("mistral-7b", n=2)
    (['meta-llama/Llama-2-70b', 'meta-llama/Llama-2-7b'], ['mistralai/Mistral-7B-v0.1', 'mistralai/Mistral-7B-v0.3'])
    """
    wanted = id.strip().lower()
    if n < 1 or not wanted:
        return []
    by_compared: dict[str, str] = {}
    for name in _index():
        by_compared.setdefault((name if "/" in wanted else name.rpartition("/")[2]).lower(), name)
    begun = sorted((name for name in by_compared if name.startswith(wanted)), key=len)
    near = dict.fromkeys([*begun, *suggest_names(wanted, by_compared, limit=n)])
    return [by_compared[name] for name in near][:n]


def all_models() -> list[CatalogModel]:
    """Return every model of the catalog, by family and in the order of its rows."""
    return [_model(row) for family in sorted(set(_index().values())) for row in _rows(family)]


def build_index() -> dict[str, str]:
    """Return the index the family files call for: each id and alias, as written, with its family's file name.

    ``data/models/index.json`` holds it; a test compares the two.
    """
    families = sorted(path.stem for path in _DATA.glob("*.json") if path.stem != _INDEX)
    return {name: family for family in families for row in _rows(family) for name in _names(row)}


@cache
def _index() -> dict[str, str]:
    return _read(_INDEX)  # type: ignore[no-any-return]


@cache
def _families() -> dict[str, str]:
    return {name.lower(): family for name, family in _index().items()}


@cache
def _rows(family: str) -> list[dict[str, Any]]:
    return _read(family)  # type: ignore[no-any-return]


def _read(name: str) -> Any:
    return json.loads((_DATA / f"{name}.json").read_bytes())


def _names(row: dict[str, Any]) -> list[str]:
    return [row["id"], *row["aliases"]]


def _lower_names(row: dict[str, Any]) -> list[str]:
    return [name.lower() for name in _names(row)]


def _model(row: dict[str, Any]) -> CatalogModel:
    return CatalogModel(
        id=row["id"],
        config=deepcopy(row["config"]),
        source=row["source"],
        verified=row["verified"],
        parameters_published=row["parameters_published"],
        parameters_source=row["parameters_source"],
        remote_code=row.get("remote_code"),
        aliases=tuple(row["aliases"]),
    )
