"""What the site needs: doctests that stand bare in a page, as in Python's own documentation, become code."""

from __future__ import annotations

import re
from typing import Any

BARE = re.compile(r"(?:^|(?<=\n\n))(>>> .*?)(?=\n\n|\Z)", re.DOTALL)
FENCE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2 *$", re.DOTALL | re.MULTILINE)


def fenced(markdown: str) -> str:
    r"""Return the page with its bare doctests in fences; what is in fences already stays.

    >>> fenced("Say:\n\n>>> 1 + 1\n2\n\nDone.")
    'Say:\n\n```pycon\n>>> 1 + 1\n2\n```\n\nDone.'
    """
    parts, last = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [_in_fences(markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, _in_fences(markdown[last:])])


def _in_fences(text: str) -> str:
    return BARE.sub(r"```pycon\n\1\n```", text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page."""
    return fenced(markdown)
