"""From what a user calls a model to its ``config.json``: a local path, the catalog, the Hugging Face cache, the hub.

Only ``config.json`` is ever read. huggingface_hub is imported when the hub itself is asked, and not before:
the cache is found by its documented layout (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Container
from pathlib import Path
from typing import Any

from memplan.errors import ResolutionError, SpecError, UnsupportedError
from memplan.specs.fields import Fields
from memplan.specs.model import ModelSpec
from memplan.units import MiB

__all__ = ["resolve_config"]

_LARGEST_FILE = 10 * MiB
"""A ``config.json`` has kilobytes, or a megabyte where it names thousands of classes."""

# The rules of huggingface_hub's validate_repo_id.
_HUB_ID = re.compile(
    r"(?!.*(?:--|\.\.))(?!.*\.git$)(?:\w(?:[\w.-]*\w)?/)?\w(?:[\w.-]{0,94}\w)?",
    re.ASCII,
)
_HUB_URL = re.compile(r"https?://[^/]+/([^/]+/[^/?#]+)")
_DISK_ERRORS = {errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.EPERM, errno.EROFS}
_LONGEST_ID = 2 * 96 + 1
_PARTS = ("text_config", "vision_config", "audio_config", "speech_config", "video_config")


def resolve_config(model: str | os.PathLike[str], *, known_model_types: Container[str] = ()) -> ModelSpec:
    """Find a model's config by local path, catalog, Hugging Face cache and hub, in that order.

    ``model`` is a folder with a ``config.json``, a JSON file, or a hub id; a path that exists wins. The spec's
    ``source`` says which one answered: ``path:...``, ``catalog``, ``hf-cache@REVISION`` or ``hub@REVISION``.
    The hub is asked for ``config.json`` alone, through huggingface_hub, which honours HF_TOKEN and HF_ENDPOINT;
    with HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) it is not asked.

    A config with ``auto_map`` brings its own code, which is never run: it is accepted only if its ``model_type``
    is among ``known_model_types``, the types that can be estimated without that code.

    Raises ResolutionError if nothing is found or may be read, SpecError for a file that is not a model's config,
    UnsupportedError for remote code and for multimodal models.
    """
    name = os.fspath(model) if isinstance(model, os.PathLike) else model
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ResolutionError.at("model", model, "is not a model", "Give a hub id, a folder or a config.json.")
    found = _from_path(name) or _from_catalog(name) or _from_cache(name) or _from_hub(name)
    return _spec(name, *found, known_model_types)


def _from_path(name: str) -> tuple[dict[str, Any], str] | None:
    path = _expanded(name)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise _unreadable(path, error) from None
    except OSError:
        return None  # a name that no path can have, such as one too long: it may still be judged as an id
    return _read(_config_in(path, name) if path.is_dir() else path), f"path:{name}"


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~ without a home
        return Path(name)


def _config_in(folder: Path, name: str) -> Path:
    config = folder / "config.json"
    try:
        config.lstat()
    except FileNotFoundError:
        if (folder / "adapter_config.json").is_file():
            raise _refused(folder, "holds a PEFT adapter, not a model", "Give its base model.") from None
        remedy = "Give the folder that from_pretrained loads"
        if _HUB_ID.fullmatch(name):
            remedy += f"; if the hub's {name} is meant, run from a folder without that path"
        raise _refused(folder, "is a folder without config.json", remedy + ".") from None
    except OSError as error:
        raise _unreadable(config, error) from None
    return config


def _from_catalog(name: str) -> tuple[dict[str, Any], str] | None:
    from memplan.catalog.models import lookup

    row = lookup(name)
    return None if row is None else (row.config, "catalog")


def _from_cache(name: str) -> tuple[dict[str, Any], str] | None:
    _check_id(name)
    repository = _cache_folder() / f"models--{name.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    config = repository / "snapshots" / revision / "config.json"
    return (_read(config), f"hf-cache@{revision}") if config.is_file() else None


def _cache_folder() -> Path:
    """Return the hub's cache by the environment, as huggingface_hub finds it."""
    environ = os.environ
    base = environ.get("XDG_CACHE_HOME", "~/.cache")
    home = environ.get("HF_HOME", f"{base}/huggingface")
    cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(cache)).expanduser()


def _from_hub(name: str) -> tuple[dict[str, Any], str]:
    switch = _offline_switch()
    if switch:
        remedy = f"Unset {switch} to ask the hub, or give a folder with its config.json."
        problem = f"is not in the catalog or the local cache, and {switch} is set"
        raise ResolutionError.at("model", name, problem, _near(name) + remedy)
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    try:
        # Asked first for the size, and because a hub that is out of reach is then tried once, not for half a minute.
        size = get_hf_file_metadata(hf_hub_url(name, "config.json")).size or 0
        config = Path(hf_hub_download(name, "config.json")) if size <= _LARGEST_FILE else None
    except Exception as error:  # the HTTP library behind huggingface_hub, and its errors, differ between versions
        raise _hub_error(name, error) from error
    if config is None:
        remedy = "Give a folder with its config.json."
        raise ResolutionError.at("model", name, f"has a config.json of {size} bytes on the hub, too many", remedy)
    return _read(config), f"hub@{config.parent.name}"


def _offline_switch() -> str | None:
    # HF_HUB_OFFLINE wins where both are set, as in huggingface_hub.constants.
    switch = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
    return switch if os.environ.get(switch, "").upper() in {"1", "ON", "YES", "TRUE"} else None


def _hub_error(name: str, error: Exception) -> ResolutionError:
    from huggingface_hub import errors

    folder = "give a folder with its config.json."
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        problem, remedy = "was not found on the hub", f"{_near(name)}If it is private, set HF_TOKEN; or {folder}"
    elif isinstance(error, errors.GatedRepoError) or status in {401, 403}:
        page = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{name}"
        problem = "is gated: the hub refused its config.json"
        remedy = f"Accept its licence at {page} and set HF_TOKEN to your token, or {folder}"
    elif isinstance(error, errors.EntryNotFoundError) and status is not None:
        problem = "has no config.json on the hub"
        remedy = f"Name a repository in the transformers format, or {folder}"
    elif status is not None:
        problem, remedy = f"could not be fetched: the hub answered {status}", f"Try again later, or {folder}"
    elif isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        problem = f"could not be stored in {_cache_folder()} ({error.strerror})"
        remedy = f"Set HF_HOME to a folder with space that you may write, or {folder}"
    else:
        problem = f"is not in the catalog or the local cache, and the hub could not be reached ({type(error).__name__})"
        remedy = f"{_near(name)}Check the connection and HF_ENDPOINT, or {folder}"
    return ResolutionError.at("model", name, problem, remedy)


def _check_id(name: str) -> None:
    if _HUB_ID.fullmatch(name) and not name.endswith(".json"):
        return
    url = _HUB_URL.match(name)
    remedy = f"Write {url[1]}." if url else f"{_near(name)}A hub id is name or organisation/name."
    raise ResolutionError.at("model", name, "is neither an existing path nor a hub id", remedy)


def _near(name: str) -> str:
    from memplan.catalog.models import nearest

    names = nearest(name) if len(name) <= _LONGEST_ID else []  # a longer text is no misspelt id, and slow to compare
    return f"Did you mean {' or '.join(names)}? " if names else ""


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most 10 MiB."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _refused(path, "is not a regular file", "Give a folder or a config.json.")
        content = b""
        if status.st_size <= _LARGEST_FILE:
            with path.open("rb") as file:
                content = file.read(_LARGEST_FILE + 1)  # bounded: the file may be growing
    except OSError as error:
        if path.is_symlink() and isinstance(error, FileNotFoundError):
            raise _refused(path, "is a link that leads nowhere", "Restore its target.") from None
        raise _unreadable(path, error) from None
    size = max(status.st_size, len(content))
    if size > _LARGEST_FILE:
        raise _wrong(path, f"has {size} bytes, too many for a config.json", "Give the config, not the weights.")
    return _parse(path, content)


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        text = content.decode("utf-8")
        config = json.loads(text)
    except UnicodeDecodeError as error:
        remedy = "Save it as UTF-8 text."
        raise _wrong(path, f"is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}", remedy) from None
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        problem = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        remedy = "It ends too early: fetch it again." if cut else "Correct it there."
        raise _wrong(path, problem, remedy) from None
    except RecursionError:
        raise _wrong(path, "is nested too deeply", "A config has a few levels.") from None
    except ValueError as error:  # an integer of thousands of digits
        raise _wrong(path, f"is not JSON that can be read: {error}", "Correct it there.") from None
    if not isinstance(config, dict):
        kind = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(type(config), "a number")
        raise _wrong(path, f"holds {kind}, not an object", "A config starts with {.")
    return config


def _spec(name: str, config: dict[str, Any], source: str, known_model_types: Container[str]) -> ModelSpec:
    fields = Fields(config, name)
    model_type = fields.str("model_type")
    _refuse_multimodal(name, model_type, config)
    if config.get("auto_map") and model_type not in known_model_types:
        raise UnsupportedError.at(
            "model",
            name,
            f"brings its own code (auto_map) for model_type {model_type!r}, and remote code is never run",
            "Give the config of a model that transformers itself has.",
        )
    architectures = fields.list_str("architectures")
    if not architectures:
        raise fields.wrong("architectures", [], "names no class", 'Write one, as in ["LlamaForCausalLM"].')
    return ModelSpec(id=name, model_type=model_type, architecture=architectures[0], config=config, source=source)


def _refuse_multimodal(name: str, model_type: str, config: dict[str, Any]) -> None:
    parts = [part for part in _PARTS if isinstance(config.get(part), dict)]
    if not parts:
        return
    text_type = config[parts[0]].get("model_type") if parts[0] == "text_config" else None
    remedy = f"Its text part is a {text_type} model" if text_type else "It is built on a text model"
    problem = f"is multimodal ({model_type} with {', '.join(parts)}), which memplan does not model"
    raise UnsupportedError.at("model", name, problem, remedy + ": give that model's config.")


def _refused(path: Path, problem: str, remedy: str) -> ResolutionError:
    # Not SpecError.at, which shortens long values: a path must be read to its end.
    return ResolutionError(f"{path}: {problem}. {remedy}")


def _wrong(path: Path, problem: str, remedy: str) -> SpecError:
    return SpecError(f"{path}: {problem}. {remedy}")


def _unreadable(path: Path, error: OSError) -> ResolutionError:
    reason = (error.strerror or type(error).__name__).lower()
    return _refused(path, f"cannot be read ({reason})", "Check the path and its permissions.")
