"""Sliders beside an estimate, for notebooks. Needs the ``notebook`` extra, for ipywidgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from memplan.errors import MemplanError, UnsupportedError
from memplan.render import html
from memplan.results import Estimate

__all__ = ["WhatIf"]


class WhatIf:
    """An estimate that follows its controls: micro-batch, length, strategy and checkpointing.

    ``estimate`` answers for the options that the controls choose. ``choices`` are their values by name, ``chosen``
    those that they start with. In a notebook it shows itself; :meth:`show` is what a moved slider calls.
    """

    def __init__(
        self,
        estimate: Callable[[Mapping[str, Any]], Estimate],
        choices: Mapping[str, Sequence[Any]],
        chosen: Mapping[str, Any],
    ) -> None:
        try:
            import ipywidgets
        except ImportError:
            remedy = "Run pip install 'memplan[notebook]'."
            raise UnsupportedError(f"what_if: ipywidgets is not installed. {remedy}") from None
        self._estimate = estimate
        self.controls: dict[str, Any] = {
            name: ipywidgets.SelectionSlider(
                options=list(values),
                value=chosen[name],
                description=name.replace("_", " "),
                continuous_update=True,
                layout={"width": "36em"},
                style={"description_width": "12em"},
            )
            for name, values in choices.items()
        }
        self.page = ipywidgets.HTML()
        self.estimate: Estimate | None = None
        """Of what the controls say; None where that is refused, and the page says why."""
        self.widget = ipywidgets.VBox([*self.controls.values(), self.page])
        for control in self.controls.values():
            control.observe(lambda _: self.show(), names="value")
        self.show()

    def show(self) -> str:
        """Estimate what the controls say, and return the page."""
        options = {name: control.value for name, control in self.controls.items()}
        try:
            self.estimate = self._estimate(options)
            self.page.value = html.estimate_html(self.estimate)
        except MemplanError as error:
            self.estimate = None
            self.page.value = f"<div>{escape(str(error))}</div>"
        page: str = self.page.value
        return page

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.widget._repr_mimebundle_(**options)
