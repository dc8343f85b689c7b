"""Estimates as text for a terminal: aligned numbers, bars, a verdict.

Facts and names of setups go on to a next line where they are long; names of models and sources of numbers are cut.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memplan.answers import Check, Comparison, Plan
from memplan.render import words
from memplan.render.explain import explanation, levers
from memplan.results import (
    ENGINE_CONFIG,
    Assumption,
    Estimate,
    EstimateList,
    Verdict,
)

if TYPE_CHECKING:
    from memplan.catalog.models import CatalogModel
    from memplan.specs.hardware import GPUSpec

__all__ = ["check_text", "comparison_text", "estimate_text", "estimates_text", "gpus_text", "models_text"]

_STYLES: dict[Verdict, str] = {
    "fits": "bold green",
    "tight": "bold yellow",
    "does-not-fit": "bold red",
    "unknown": "bold",
}
_FINDINGS = {"error": "bold red", "warning": "bold yellow", "info": "bold"}
_WIDE = 110
"""Columns from which phases stand beside the components, not below them."""
_GAP = 4
_INDENT = 2
_PADDING = 2
_LABEL = 9
_NAME = 13
_NUMBER = 9
_EIGHTHS = " ▏▎▍▌▋▊▉"
_ASCII = str.maketrans("█▉▊▋▌▍▎▏…", "#####---.")
"""For a terminal, or a file, whose encoding has no such characters."""


def estimate_text(
    estimate: Estimate, *, gpus: Sequence[str] = (), options: Sequence[str] = (), console: Console | None = None
) -> str:
    """Return an estimate as a page of text for the width and the colours of ``console``, by default stdout's.

    ``gpus`` are names of GPUs that the setup fits on, ``options`` what may be added to make it fit: both are
    offered where it does not fit.
    """
    console = console or _console()
    next_steps = words.next_steps(estimate, gpus, options)
    return _text(Group(_model(estimate), _setup(estimate), *_body(estimate, console.width, next_steps)), console)


def estimates_text(
    estimates: EstimateList,
    *,
    gpus: Sequence[Sequence[str]] = (),
    options: Sequence[str] = (),
    console: Console | None = None,
) -> str:
    """Return a row per estimate, and the page of the best.

    ``gpus`` holds names of GPUs that the first estimate fits on, and may go on with those of the others.
    """
    console = console or _console()
    best = estimates.best
    if len(estimates.estimates) == 1:
        return estimate_text(best, gpus=gpus[0] if gpus else (), options=options, console=console)
    names, place = words.rungs(estimates.estimates), estimates.estimates.index(best)
    next_steps = words.next_steps(best, gpus[0] if gpus else (), options, of=names[0] if place else "")
    title = Text(names[place], style="bold")
    body = _body(best, console.width, next_steps)
    return _text(Group(_model(best), _rungs(estimates, gpus), Text(), title, _setup(best), *body), console)


def check_text(check: Check, *, console: Console | None = None) -> str:
    """Return the page of what files need, and below it what is wrong with them."""
    console = console or _console()
    page = "" if check.estimate is None else estimate_text(check.estimate, console=console)
    if not check.findings:
        return page
    parts: list[RenderableType] = [Text(), Text(words.findings_title(check.findings), style="bold")]
    for finding in check.findings:
        table = _grid()
        table.add_column(min_width=_LABEL)
        table.add_column(overflow="fold")
        table.add_row(
            Text(finding.severity, style=_FINDINGS[finding.severity]),
            Text.assemble((finding.code, "bold"), "  ", finding.path),
        )
        table.add_row("", Text(finding.message))
        table.add_row("", Text(finding.remedy, style="dim"))
        parts += [_indented(table)]
    return f"{page}\n{_text(Group(*parts), console)}" if page else _text(Group(*parts[1:]), console)


def plan_text(plan: Plan, *, folder: str | None = None, console: Console | None = None) -> str:
    """Return a row per rung, the page of the best, and how to run what was written into ``folder``."""
    console = console or _console()
    first = (plan.best or plan.rungs[0]).estimate
    of_lengths = plan.solved is not None and plan.solved.question == "seq-len"
    table = _grid(header=True)
    table.add_column("rung")
    # Rungs with steps of different sizes are compared by what they get through.
    by_tokens = plan.solved is not None and plan.solved.question in ("micro-batch", "seq-len")
    speed = "tokens/s" if by_tokens else "s/step"
    for header in ("tokens" if of_lengths else "batch", "peak GiB", "host GiB", speed):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for rung in plan.rungs:
        found, chosen = rung.estimate, rung == plan.best
        table.add_row(
            rung.name,
            words.tokens(found) if of_lengths else words.micro_batches(found),
            words.gib(found.gpu.peak_device),
            words.gib(found.host.peak),
            words.speed_in_a_row(found, by_tokens=by_tokens),
            Text(words.verdict_in_a_row(found), style=_STYLES[found.verdict]),
            style="bold" if chosen else "",
        )
    best = plan.best
    if best is None:
        last = next(rung for rung in reversed(plan.rungs) if rung.estimate.verdict == plan.verdict)
        answer, why = "Nothing fits.", f"{last.name}: {last.reason_passed_over}."
        if plan.verdict == "unknown":
            next_step = words.next_steps(last.estimate)
            answer, why = "Whether anything fits is not known.", f"{why} {next_step[:1].upper()}{next_step[1:]}."
        if plan.solved is not None and plan.verdict != "unknown":
            answer = f"{words.solved(plan)}."
        unwritten = "" if folder is None else " No files are written."
        said = Text(f"{answer} {why}{unwritten}")
        return _text(Group(_model(first), Text(), table, Text(), said, *_remedies(plan)), console)
    title = Text(best.name, style="bold")
    body = _body(best.estimate, console.width, words.next_steps(best.estimate))
    answers: list[RenderableType] = []
    if plan.solved is not None:
        answers = [Text(), Text(f"{words.solved(plan)}.", style="bold")]
    answers += _remedies(plan)
    own = [_setup(best.estimate)]
    if words.sizes(best.estimate.setup):
        sizes = Table.grid(padding=(0, _PADDING, 0, 0))  # all of them: they are why it fits
        sizes.add_column(min_width=_LABEL)
        sizes.add_row(Text("buffers", style="dim"), Text(words.sizes(best.estimate.setup)))
        own.append(_indented(sizes))
    parts = (_model(first), Text(), table, *answers, Text(), title, *own, *body, *_front(plan))
    page = _text(Group(*parts), console)
    return page if folder is None else f"{page}\n\n{_how_to_run(plan.files, folder, console.width)}"


def _front(plan: Plan) -> list[RenderableType]:
    """The setups that no other beats both in time and in memory."""
    if len(plan.pareto) < 2:
        return []
    table = _grid(header=True)
    table.add_column("setup")
    for header in ("batch", "GPU GiB", "to spare", "s/step"):
        table.add_column(header, justify="right", no_wrap=True)
    for each in plan.pareto:
        memory = (words.gib(each.high), words.gib(each.headroom))
        table.add_row(words.point(each), words.batch_of(each), *memory, f"{each.seconds:.3g}")
    return [Text(), Text("What no other setup beats both in time and in memory", style="bold"), table]


def _remedies(plan: Plan) -> list[RenderableType]:
    """What would fit, and on which rung; nothing where something does."""
    if not plan.remedies:
        return []
    table = _grid(header=True)
    table.add_column("with")
    table.add_column("rung")
    for header in ("GPU GiB", "host GiB", "s/step"):
        table.add_column(header, justify="right", no_wrap=True)
    for each in plan.remedies:
        seconds = "-" if each.seconds is None else f"{each.seconds:.3g}"
        table.add_row(each.options, each.rung, words.gib(each.high), words.gib(each.host), seconds)
    return [Text(), Text("What would fit", style="bold"), _indented(table)]


def _how_to_run(files: Sequence[str], folder: str, width: int) -> str:
    """The files that were written, and the commands, which are whole however long they are: they are copied."""
    script = shlex.quote(f"{folder.rstrip('/')}/launch.sh")
    lines = [f"{'try':{_LABEL}}  bash {script} --smoke", f"{'run':{_LABEL}}  bash {script}"]
    indent = " " * (_INDENT + _LABEL + 2)
    first = f"{' ' * _INDENT}{'written':{_LABEL}}  "
    written = textwrap.fill(", ".join(files), width, initial_indent=first, subsequent_indent=indent)
    return "\n".join((written, *(" " * _INDENT + line for line in lines)))


def comparison_text(comparison: Comparison, console: Console | None = None) -> str:
    """Return a row per figure, memplan's last for each setup, and below what each tool leaves out."""
    notes = {(row.tool, row.leaves_out): row.leaves_out for row in comparison.rows}
    numbers = {note: str(number) for number, note in enumerate(notes, start=1)}
    table = _grid(header=True)
    table.add_column("tool", no_wrap=True)
    table.add_column("option")
    for header in ("GPU GiB", "host GiB"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for row in comparison.rows:
        own = row.tool == "memplan"
        sizes = ("-" if size is None else words.gib(size) for size in (row.gpu, row.host))
        table.add_row(row.tool, row.option, *sizes, numbers[row.tool, row.leaves_out], style="bold" if own else "")
        if own and row is not comparison.rows[-1]:
            table.add_row()
    left_out = _grid()
    left_out.add_column(justify="right", no_wrap=True)
    left_out.add_column(no_wrap=True)
    left_out.add_column()
    for note, text in notes.items():
        left_out.add_row(numbers[note], note[0], text)
    facts = _facts(("hardware", words.compared_hardware(comparison)), ("DeepSpeed", words.counted(comparison.model)))
    title = _line(comparison.model.id, style="bold")
    left = Text("What each leaves out", style="bold")
    return _text(Group(title, facts, Text(), table, Text(), left, _indented(left_out)), console or _console())


def gpus_text(gpus: Sequence[GPUSpec], console: Console | None = None) -> str:
    """Return the GPUs of a catalog as a table."""
    table = _grid(header=True)
    table.add_column("GPU", no_wrap=True, min_width=max((len(gpu.name) for gpu in gpus), default=0))
    for header in ("GiB", "range", "GB/s", "bf16", "fp16"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("link", no_wrap=True)
    for gpu in gpus:
        table.add_row(
            gpu.name,
            words.gib(gpu.memory_bytes),
            words.interval(int(gpu.memory.low), int(gpu.memory.high)),
            f"{gpu.bandwidth_gb_per_s:g}",
            *("-" if speed is None else f"{speed:g}" for speed in (gpu.bf16_tflops, gpu.fp16_tflops)),
            f"{gpu.link} {gpu.link_gb_per_s:g}",
        )
    notes = (
        "GiB: what torch sees of the memory. GB/s: its bandwidth. bf16, fp16: dense",
        "TFLOPS. link: to GPUs of the same node, in GB/s and one direction.",
        "--json adds the sources.",
    )
    return _text(Group(table, *_notes(*notes)), console or _console())


def models_text(models: Sequence[CatalogModel], console: Console | None = None) -> str:
    """Return the models of a catalog as a table."""
    table = _grid(header=True)
    table.add_column("model", no_wrap=True, min_width=max((len(model.id) for model in models), default=0))
    types = [str(model.config.get("model_type", "")) for model in models]
    table.add_column("type", no_wrap=True, min_width=max((len(name) for name in types), default=0))
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("sure", no_wrap=True)
    for model, model_type in zip(models, types, strict=True):
        published = model.parameters_published
        table.add_row(
            model.id,
            model_type,
            "" if published is None else words.count(published),
            "yes" if model.verified else "no",
        )
    notes = (
        "size: the parameters that an independent source publishes for the class.",
        "sure: a second source confirms the config. --json adds both, and the config.",
    )
    return _text(Group(table, *_notes(*notes)), console or _console())


def _notes(*notes: str) -> list[Text]:
    return [Text(), *(Text(note, style="dim") for note in notes)]


# -- parts of a page -------------------------------------------------------------------------------------------------


def _model(estimate: Estimate) -> RenderableType:
    facts = _facts(
        ("model", words.model_facts(estimate)),
        ("config", f"from {estimate.model.source}"),
        ("hardware", words.hardware(estimate)),
    )
    return Group(_line(estimate.model.id, style="bold"), facts)


def _setup(estimate: Estimate) -> RenderableType:
    return _facts(("setup", words.setup_facts(estimate)), ("precision", words.precision_facts(estimate)))


def _facts(*facts: tuple[str, str]) -> RenderableType:
    table = _grid()
    table.add_column(min_width=_LABEL)
    for name, fact in facts:
        table.add_row(Text(name, style="dim"), Text(fact))
    return _indented(table)


def _body(estimate: Estimate, width: int, next_steps: str) -> list[RenderableType]:
    parts: list[RenderableType] = [Text()]
    if width >= _WIDE:
        half = (width - _GAP) // 2
        beside = Table.grid(padding=(0, _GAP, 0, 0))
        beside.add_row(_components(estimate, half), _phases(estimate, half))
        parts.append(beside)
    else:
        parts += [_components(estimate, width), Text(), _phases(estimate, width)]
    parts += [*_elsewhere(estimate, width), Text(), _conclusion(estimate, next_steps)]
    said = [each.source for each in estimate.assumptions if each.name == ENGINE_CONFIG]
    if said:
        notes = Text("\n".join(said))
        parts += [Text(), Group(Text("The engine's config", style="bold"), _indented(notes))]
    others = [each for each in estimate.assumptions if each.name != ENGINE_CONFIG]
    if others:
        parts += [Text(), _assumptions(others)]
    if estimate.explanation:
        parts += [Text(), explanation(estimate.explanation)]
    if estimate.levers:
        parts += [Text(), levers(estimate.levers)]
    return parts


def _rungs(estimates: EstimateList, gpus: Sequence[Sequence[str]]) -> RenderableType:
    each_has_gpus = len(gpus) == len(estimates.estimates)
    table = _grid(header=True)
    columns: dict[str, list[str]] = {
        "peak GiB": [words.gib(each.gpu.peak_device) for each in estimates.estimates],
        "low .. high": [words.interval(each.gpu.low, each.gpu.high) for each in estimates.estimates],
        "verdict": [words.verdict_in_a_row(each) for each in estimates.estimates],
    }
    if each_has_gpus:
        columns["fits on"] = [next(iter(names), "no GPU") for names in gpus]
    table.add_column("setup")
    for header, cells in columns.items():  # whole: the setup gets what is left
        is_number = header in ("peak GiB", "low .. high")
        width = max(map(len, (header, *cells)))
        table.add_column(header, justify="right" if is_number else "left", no_wrap=True, min_width=width)
    setups = words.rungs(estimates.estimates)
    for estimate, setup, peak, interval, verdict, *gpu in zip(
        estimates.estimates, setups, *columns.values(), strict=True
    ):
        table.add_row(Text(setup), peak, interval, Text(verdict, style=_STYLES[estimate.verdict]), *gpu)
    return Group(Text(), table)


def _components(estimate: Estimate, width: int) -> RenderableType:
    gpu = estimate.gpu
    table = _Bars(f"GPU memory at its peak ({gpu.peak_phase}), GiB", max(gpu.peak_device, gpu.capacity or 0), width)
    for name, size in words.components_of(estimate):
        table.add(name, size)
    table.add_total("allocated", gpu.peak_allocated)
    table.add("fragmentation", gpu.components.fragmentation)
    table.add_total("reserved", gpu.peak_reserved)
    table.add("context", gpu.components.context)
    table.add("nccl", gpu.components.nccl)
    table.add_total("device", gpu.peak_device, words.interval(gpu.low, gpu.high))
    if gpu.capacity is not None:
        table.add_total("capacity", gpu.capacity)
    return table.page()


def _phases(estimate: Estimate, width: int) -> RenderableType:
    gpu = estimate.gpu
    table = _Bars("Allocated in each phase, GiB", max(gpu.peak_device, gpu.capacity or 0), width)
    for phase in gpu.phases:
        table.add(phase.name, phase.allocated, always=True)
    return table.page()


def _elsewhere(estimate: Estimate, width: int) -> list[RenderableType]:
    """Host memory and NVMe of a node, where the setup uses them."""
    host, nvme = estimate.host, estimate.nvme
    ranks = f"{host.ranks} rank{'s' if host.ranks > 1 else ''}"
    fullest = max(host.phases, key=lambda phase: phase.allocated, default=None)
    during = f", in phase {fullest.name}" if fullest is not None else ""
    pages: list[RenderableType] = []
    for title, components, total, capacity in (
        (f"Host memory of a node ({ranks}){during}, GiB", host.components, host.peak, host.capacity),
        (f"NVMe of a node ({ranks}), GiB", nvme.components, nvme.bytes, nvme.capacity),
    ):
        if total:
            table = _Bars(title, max(total, capacity or 0), width)
            for name, size in components.items():
                table.add(name, size)
            table.add_total("total", total)
            if capacity is not None:
                table.add_total("capacity", capacity)
            pages += [Text(), table.page()]
    return pages


def _conclusion(estimate: Estimate, next_steps: str) -> RenderableType:
    table = _grid()
    table.add_column(min_width=_LABEL)
    table.add_row(Text("verdict", style="dim"), Text(words.verdict(estimate), style=_STYLES[estimate.verdict]))
    for name, text in (("next", next_steps), *words.extras(estimate)):
        if text:
            table.add_row(Text(name, style="dim"), Text(text))
    return _indented(table)


def _assumptions(assumptions: Sequence[Assumption]) -> RenderableType:
    rows = [(assumption.name, *words.assumed(assumption)) for assumption in assumptions]
    table = _grid()
    for column in range(2):  # whole, as long as there is room; the sources get what is left
        table.add_column(no_wrap=True, min_width=max(len(row[column]) for row in rows))
    for name, value, source in rows:
        table.add_row(name, value, _line(source), style="dim")
    return Group(Text("Assumptions", style="bold"), _indented(table))


# -- elements --------------------------------------------------------------------------------------------------------


class _Bars:
    """Rows of a name, a size in GiB and a bar: all bars to one scale."""

    def __init__(self, title: str, full: int, width: int) -> None:
        self._title = title
        self._full = full
        self._room = max(0, width - _INDENT - _NAME - _NUMBER - 2 * _PADDING)
        self._table = _grid()
        self._table.add_column(min_width=_NAME, no_wrap=True)
        self._table.add_column(min_width=_NUMBER, no_wrap=True, justify="right")
        self._table.add_column(no_wrap=True)

    def add(self, name: str, size: int, *, always: bool = False) -> None:
        """Add a part; nothing where there is nothing."""
        if size or always:
            self._table.add_row(name, words.gib(size), Text(bar(size, self._full, self._room), style="cyan"))

    def add_total(self, name: str, size: int, note: str = "") -> None:
        """Add a sum of the rows above."""
        self._table.add_row(name, words.gib(size), note, style="bold")

    def page(self) -> RenderableType:
        return Group(Text(self._title, style="bold"), _indented(self._table))


def bar(size: int, full: int, width: int) -> str:
    """Return a bar of up to ``width`` characters, in eighths; what is there at all shows.

    >>> bar(3, 4, 4), bar(1, 10**9, 4), bar(0, 4, 4)
    ('███', '▏', '')
    """
    if size <= 0 or full <= 0 or width <= 0:
        return ""
    eighths = max(1, min(8 * width, round(8 * width * size / full)))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _grid(*, header: bool = False) -> Table:
    return Table(box=None, show_header=header, show_edge=False, pad_edge=False, padding=(0, _PADDING, 0, 0))


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _indented(renderable: RenderableType) -> RenderableType:
    return Padding(renderable, (0, 0, 0, _INDENT))


def _console() -> Console:
    # What is shown are names and numbers of a user's own: nothing in them is markup.
    return Console(highlight=False, markup=False, emoji=False)


def _text(page: RenderableType, console: Console) -> str:
    with console.capture() as capture:
        console.print(page)
    text = "\n".join(line.rstrip() for line in capture.get().rstrip().split("\n"))
    return text if console.encoding.lower().startswith("utf") else text.translate(_ASCII)
