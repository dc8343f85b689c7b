"""When the versions came out that decide rules of memplan, for rows that state a date, or one library of several.

Months of PyPI's release histories: https://pypi.org/project/torch/#history, and so for the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

RELEASES: dict[str, dict[str, str]] = {
    "torch": {
        "1.10": "2021-10", "1.11": "2022-03", "1.12": "2022-06", "1.13": "2022-10", "2.0": "2023-03", "2.1": "2023-10",
        "2.2": "2024-01", "2.3": "2024-04", "2.4": "2024-07", "2.5": "2024-10", "2.6": "2025-01", "2.7": "2025-04",
        "2.8": "2025-08", "2.9": "2025-10", "2.10": "2026-01",
    },
    "transformers": {
        "4.30": "2023-06", "4.31": "2023-07", "4.33": "2023-09", "4.34": "2023-10", "4.35": "2023-11",
        "4.36": "2023-12", "4.37": "2024-01", "4.38": "2024-02", "4.39": "2024-03", "4.40": "2024-04",
        "4.41": "2024-05", "4.42": "2024-06", "4.43": "2024-07", "4.44": "2024-08", "4.45": "2024-09",
        "4.46": "2024-10", "4.47": "2024-12", "4.48": "2025-01", "4.49": "2025-02", "4.50": "2025-03",
        "4.51": "2025-04", "4.52": "2025-05", "4.53": "2025-06", "4.54": "2025-07", "4.55": "2025-08",
        "4.57": "2025-10", "5.0": "2026-01",
    },
    "peft": {
        "0.3": "2023-05", "0.4": "2023-07", "0.5": "2023-08", "0.6": "2023-11", "0.7": "2023-12", "0.8": "2024-01",
        "0.9": "2024-02", "0.10": "2024-03", "0.11": "2024-05", "0.12": "2024-07", "0.13": "2024-09",
        "0.14": "2024-12", "0.15": "2025-03", "0.16": "2025-07", "0.17": "2025-08", "0.18": "2025-11",
    },
    "deepspeed": {
        "0.10": "2023-07", "0.11": "2023-10", "0.12": "2023-11", "0.13": "2024-01", "0.14": "2024-03",
        "0.15": "2024-08", "0.16": "2024-11", "0.17": "2025-06", "0.18": "2025-10", "0.19": "2026-05",
    },
    "cuda": {
        "11.1": "2021-03", "11.3": "2021-10", "11.6": "2022-06", "11.7": "2022-10", "11.8": "2023-10",
        "12.1": "2023-10", "12.4": "2024-07", "12.6": "2025-01", "12.8": "2025-08", "13.0": "2026-01",
    },
}  # fmt: skip
"""library -> version -> the month it came out; of CUDA, in which torch's default wheels came to have it."""

TRL = {"0.4": "2023-03", "0.7.5": "2023-12", "0.9": "2024-06", "0.26": "2025-12"}
"""Of TRL, which is no library of memplan's, the versions since which SFTTrainer treats quantized models differently."""

EARLIEST = "2021-02"
"""Before all of them: when a version was in use that is older than its library's first one here."""

_DATE = re.compile(r"\b(20[12]\d)(?:[-/](0[1-9]|1[0-2]))?\b")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WORDED = re.compile(rf"\b({'|'.join(_MONTHS)})[a-z]*\.?\s+(20[12]\d)\b")


def month_in(text: str) -> str | None:
    """The first month that a text names, as ``2024-03``; of a year alone, its middle.

    >>> month_in("torch nightly 2023-07"), month_in("v4 (Jan 2022)"), month_in("2023"), month_in("torch 2.4")
    ('2023-07', '2022-01', '2023-07', None)
    """
    worded = _WORDED.search(text.lower())
    if worded:
        return f"{worded[2]}-{_MONTHS.index(worded[1]) + 1:02}"
    found = _DATE.search(text)
    return f"{found[1]}-{found[2] or '07'}" if found else None


def month_of(versions: Mapping[str, str]) -> str | None:
    """A month at which all of some versions were out and in use; None if no version is known here.

    Of several libraries it is that of the newest; of one alone, the month before its next version.

    >>> month_of({"torch": "2.4.1", "transformers": "4.48.1"}), month_of({"torch": "2.0"}), month_of({"torch": "1.7"})
    ('2025-01', '2023-09', '2021-02')
    """
    spans = [span for item in versions.items() if (span := _in_use(*item)) is not None]
    if len(spans) == 1:
        return spans[0][1]
    return max((since for since, _ in spans), default=None)


def newest(library: str, month: str) -> str | None:
    """The version of a library that was the newest in a month, or its first one here; None after the last known."""
    releases = RELEASES[library]
    if month > max(releases.values()):
        return None
    return next((version for version, since in reversed(releases.items()) if since <= month), next(iter(releases)))


def of_trl(version: str | None, month: str | None) -> str:
    """The version in TRL that decides for one that is stated, or else for a month; today's without both.

    >>> of_trl("0.13.0", None), of_trl(None, "2023-10"), of_trl(None, None)
    ('0.9', '0.4', '0.26')
    """
    if version is not None:
        numbers = tuple(map(int, version.split(".")))
        since = [known for known in TRL if tuple(map(int, known.split("."))) <= numbers]
    else:
        since = [known for known, out in TRL.items() if month is None or out <= month]
    return since[-1] if since else next(iter(TRL))


def _in_use(library: str, version: str) -> tuple[str, str] | None:
    """The months from a version's release to the next one's."""
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    later = None
    for known, month in reversed(RELEASES.get(library, {}).items()):
        if tuple(map(int, known.split("."))) <= numbers:
            return month, month if later is None else _before(later)
        later = month
    if library not in RELEASES:
        return None
    return EARLIEST, EARLIEST


def _before(month: str) -> str:
    year, number = map(int, month.split("-"))
    return f"{year - (number == 1)}-{12 if number == 1 else number - 1:02}"
