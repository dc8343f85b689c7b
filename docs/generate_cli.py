"""Write docs/cli.md from the command line itself. Run it after changing an option; a test compares the two.

Usage: python docs/generate_cli.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.main import get_command

from memplan.cli import app

PAGE = Path(__file__).with_name("cli.md")

INTRODUCTION = """\
# Command line

<!-- Written by docs/generate_cli.py. Change memplan/cli.py instead. -->

Names follow `TrainingArguments`, DeepSpeed and PEFT. A `MODEL` is a hub id, a local folder or a `config.json`.
With `--json` an answer is one JSON document on stdout; without, a table for people.

| exit code | meaning |
|---|---|
| 0 | fits, or unknown because no GPU is known |
| 1 | does not fit |
| 2 | bad input: one message on stderr that names the field or file, the value and the remedy |
| 3 | tight: the upper end of the estimate does not fit |

Of several setups, as on the ladder, the best verdict counts. `memplan compare` has no verdict: it ends with 0 or 2.
"""


def page() -> str:
    """Return the page."""
    group: Any = get_command(app)
    return "\n".join([INTRODUCTION, *(section(name, command) for name, command in group.commands.items())])


def section(name: str, command: Any) -> str:
    """Return a command with its arguments and options."""
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    usage = " ".join(["memplan", name, *(each.metavar for each in arguments), *(["[OPTIONS]"] if options else [])])
    parts = [f"## `memplan {name}`\n", f"```console\n$ {usage}\n```\n", f"{command.help}\n"]
    panels = dict.fromkeys(getattr(each, "rich_help_panel", None) or "" for each in options)
    for panel in panels:
        if panel:
            parts.append(f"### {panel}\n")
        own = [each for each in options if (getattr(each, "rich_help_panel", None) or "") == panel]
        parts.append("\n".join(["| option | meaning |", "|---|---|", *map(row, own)]) + "\n")
    return "\n".join(parts)


def row(option: Any) -> str:
    """Return a line of the table of options."""
    switch = " / ".join([*option.opts, *option.secondary_opts])
    written = switch if option.is_flag else f"{switch} {option.metavar}"
    cells = (text.replace("|", "\\|") for text in (f"`{written}`", option.help))
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
