"""Docstrings name things as Sphinx does, :func:`memplan.estimate`; the site shows them as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`([^`]+)`")


class Roles(griffe.Extension):
    """Turns roles into code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for everything that is documented."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda found: f"`{found[1].lstrip('~')}`", obj.docstring.value)
