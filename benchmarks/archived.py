"""Reads an archive of the campaign, ``rows.jsonl``: a line of JSON for every row that was run.

campaign.py and replay.py share this, so that what the one writes, a cut included, the other reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memplan.errors import MemplanError

REMEDY = "Take the line out, and the campaign will run its row again."


class ArchiveError(MemplanError):
    """A line is not what the campaign writes; the message names file, line and remedy."""


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of an archive; none if there is no file. Raises ArchiveError.

    What follows the last line's end is what a cut has left of a line, and is no row.
    """
    return [line for _, line in numbered(path)]


def numbered(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the lines with their numbers; see :func:`read`."""
    try:
        written = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ArchiveError(f"{path}: {error.strerror or error}. Name the folder of an archive.") from None
    for number, text in enumerate(written.split(b"\n")[:-1], 1):
        if text.strip():
            yield number, _line(text, path, number)


def mended(path: Path) -> list[dict[str, Any]]:
    """Return the lines, and take away what a cut has left behind the last one, so that more can be written."""
    found = read(path)
    if path.exists():
        written = path.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        if whole != written:
            path.write_bytes(whole)
    return found


def _line(text: bytes, path: Path, number: int) -> dict[str, Any]:
    place = f"{path}, line {number}"
    try:
        line = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise ArchiveError(f"{place}: is not text in UTF-8. {REMEDY}") from None
    except (ValueError, RecursionError):
        raise ArchiveError(f"{place}: is not JSON. {REMEDY}") from None
    row = line.get("row") if isinstance(line, dict) else None
    if not isinstance(row, dict) or not isinstance(row.get("training"), dict) or "model" not in row:
        raise ArchiveError(f"{place}: has no row with a model and its training. {REMEDY}")
    if not any(
        isinstance(line.get(name), kind) for name, kind in (("measurement", dict), ("boundary", dict), ("refused", str))
    ):
        raise ArchiveError(f"{place}: has no measurement, no boundary and no reason for there being none. {REMEDY}")
    return dict(line)
