"""The command that starts a run: a line of a shell script, a file of arguments, or a list of them.

Nothing is executed or expanded but the script's own assignments: what a variable of the shell holds is not known.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memplan.configs.argument_keys import SCRIPT_ARGUMENTS, TRAINING_ARGUMENTS
from memplan.errors import SpecError, UnsupportedError

__all__ = ["Command", "is_command", "parse_command", "plain", "visible_gpus"]

_LAUNCHERS = ("accelerate", "deepspeed", "torchrun", "llamafactory-cli")
_WRAPPERS = frozenset(
    {
        *("srun", "mpirun", "uv", "poetry", "pipenv", "conda", "mamba", "docker", "podman", "apptainer", "singularity"),
        *("nohup", "exec", "env", "time", "sudo", "numactl", "nsys"),
    }
)
"""Programs that start what stands after them."""
_OTHERS = {"trl": "trl", "axolotl": "axolotl", "swift": "ms-swift", "tune": "torchtune", "xtuner": "xtuner"}
"""Commands of other projects, which have defaults of their own."""
_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_ARRAY = re.compile(r"(?:(?:export|local|declare(?:\s+-\w+)*)\s+)?([A-Za-z_]\w*)(\+?)=\((.*)\)", re.DOTALL)
_ITEMS = re.compile(r"\$\{(\w+)\[[@*]\]\}")
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
_TRUTH = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)
"""As HfArgumentParser's ``string_to_bool``."""
_LONGEST = 2**16
"""Letters of a script, and of what its variables come to: a variable may hold another one twice over."""
_MOST_WORDS = 2_000
_PER_NODE = ("nproc_per_node", "num_gpus", "num_processes")
_NODES = ("nnodes", "num_nodes", "num_machines")
_TAKES_ALL = ("deepspeed", "llamafactory-cli")
"""Launchers that start a process on every GPU that is visible, unless they are told how many."""
_ALL_GPUS = ("gpu", "auto")
"""``--nproc_per_node`` of torchrun for as many."""
_STARTS_SEVERAL = ("srun", "mpirun", "mpiexec")
"""Wrappers that may start what stands after them more than once."""
_SBATCH = re.compile(r"#SBATCH\s+(.*)")
_SLURM = {
    "--nodes": "nodes",
    "-N": "nodes",
    "--ntasks": "ntasks",
    "-n": "ntasks",
    "--ntasks-per-node": "per_node",
    "--gpus-per-node": "gpus",
    "--gres": "gpus",
}
"""Options of ``sbatch`` and ``srun`` that say how much is started, the first two of ``mpirun`` likewise."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command, taken apart."""

    launcher: str
    """accelerate, deepspeed, torchrun, llamafactory-cli or python; empty for arguments alone."""
    options: Mapping[str, Any]
    """The launcher's own."""
    arguments: Mapping[str, Any]
    """The script's."""
    files: tuple[str, ...] = ()
    """Files that the script is given before its options."""
    environment: Mapping[str, str] = field(default_factory=dict)
    started: Mapping[str, int] | None = None
    """``nodes``, ``ntasks`` and ``per_node`` of the ``srun`` or ``mpirun`` in front of it, as far as it says so; None
    without one."""

    @property
    def per_node(self) -> int | None:
        """Processes that it starts on a node, as far as it says so."""
        if self.launcher == "deepspeed" and self._included:
            return max(map(len, self._included))
        found = self._said(_PER_NODE)
        if found is None and self.launcher == "python":
            return 1 if self.started is None else self.started.get("per_node")
        if found is None and self.launcher == "llamafactory-cli":
            found = self.environment.get("NPROC_PER_NODE")
        elsewhere = {"include", "exclude", "hostfile", "H"} & self.options.keys()
        if (found is None and self.launcher in _TAKES_ALL and not elsewhere) or found in _ALL_GPUS:
            return visible_gpus(self.environment)
        count = _count(found or "")
        return count // (self.nodes or 1) if self.launcher == "accelerate" and count is not None else count

    @property
    def nodes(self) -> int | None:
        """Nodes that it starts on, as far as it says so."""
        if self.launcher == "deepspeed" and self._included:
            return len(self._included)
        if self.launcher == "python" and self.started is not None:
            return self.started.get("nodes")
        return _count(self._said_nodes or "")

    @property
    def cluster(self) -> dict[str, int]:
        """``gpus`` and ``nodes``, each as far as it is said: nothing of what the shell or the machine has to say.

        ``per_node`` are the GPUs of one of nodes whose number is not said.
        """
        nodes = self.nodes
        if nodes is None and self.unknown_nodes is None and self.launcher != "accelerate":
            nodes = 1
        if self.launcher == "accelerate":  # which is told of all processes
            gpus = _count(self._said(_PER_NODE) or "")
        elif self.launcher == "python" and self.started is not None and "ntasks" in self.started:
            gpus = self.started["ntasks"]
        else:
            gpus = None if self.per_node is None or nodes is None else self.per_node * nodes
        found = {"gpus": gpus, "nodes": nodes, "per_node": self.per_node if gpus is None else None}
        return {name: count for name, count in found.items() if count is not None}

    @property
    def unknown_nodes(self) -> str | None:
        """How the number of nodes is written, where that is no number; None where it is one, or not said."""
        if self.launcher == "python" and self.started is not None:
            return None if "nodes" in self.started else "left to srun or mpirun"
        found = self._said_nodes
        return found if found is not None and _count(found) is None else None

    @property
    def _said_nodes(self) -> str | None:
        """The number of nodes, as it is written; LLaMA-Factory is told by a variable (``launcher.py``)."""
        if self.launcher == "llamafactory-cli":
            return self.environment.get("NNODES")
        return self._said(_NODES)

    def _said(self, names: Sequence[str]) -> str | None:
        """The first of these options, as it is written."""
        return next((_joined(self.options[name]) for name in names if name in self.options), None)

    @property
    def _included(self) -> list[list[str]]:
        """The GPUs of each node that ``--include`` of DeepSpeed names, as in ``worker-0@worker-1:0,2``, if all do."""
        nodes = str(self.options.get("include", "")).split("@")
        listed = [slots.split(",") for _, colon, slots in (node.partition(":") for node in nodes) if colon]
        return listed if len(listed) == len(nodes) and len(set(map(len, listed))) == 1 else []


def visible_gpus(environment: Mapping[str, str]) -> int | None:
    """How many GPUs CUDA_VISIBLE_DEVICES names; None where it is not set, or holds a variable."""
    names = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return len(names) if all(re.fullmatch(r"[0-9]+|GPU-[\w-]+", name.strip()) for name in names) else None


def _count(text: str) -> int | None:
    """A positive number, in digits that are one."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0 else None


def _joined(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def is_command(text: str) -> bool:
    """Whether a text is a command rather than a JSON or a YAML: a launcher, or arguments, at the start of a line."""
    body = text[:_LONGEST].lstrip("\ufeff \t\r\n")
    if body.startswith(("{", "[")):
        return False
    return body.startswith(("#!", "--")) or any(map(_starts_something, _lines(body)))


def _without_assignments(words: Sequence[str]) -> Sequence[str]:
    """A command without the variables that are set for it."""
    return words[next((place for place, word in enumerate(words) if not _ASSIGNMENT.fullmatch(word)), len(words)) :]


def _starts_something(line: str) -> bool:
    words = _without_assignments(line.split())
    names = [word.rsplit("/", 1)[-1] for word in words]
    if len(names) < 2 or names[0] in _OTHERS:
        return len(names) > 1
    return _is_launcher(names[0]) or (names[0] in _WRAPPERS and any(map(_is_launcher, names)))


def _is_launcher(name: str) -> bool:
    return name in _LAUNCHERS or re.fullmatch(r"python[\d.]*", name) is not None


def parse_command(command: str | Sequence[str], source: str) -> Command:
    """Take a command apart: text with one line that starts something, or its words. Raises SpecError."""
    if not isinstance(command, str):
        return _taken_apart(list(command), {}, source)
    if len(command) > _LONGEST:
        raise SpecError(f"{source}: has {len(command)} letters, too many for a script. Give the command alone.")
    variables = _of_sbatch(command)
    arrays: dict[str, list[str]] = {}
    started: list[list[str]] = []
    for line in _lines(command):
        if array := _ARRAY.fullmatch(line):
            items = [each for word in _words(array[3], source) for each in _split(word, variables, arrays, source)]
            arrays[array[1]] = _bounded([*arrays.get(array[1], ()), *items] if array[2] else items, source)
            continue
        for simple in _simple_commands(line):
            words = _words(simple, source)
            while words and (match := _ASSIGNMENT.fullmatch(words[0])) and len(words) == 1:
                variables[match[1]] = _expanded(match[2], variables, source)
                words = words[1:]
            if words and words[0] == "export":
                for word in words[1:]:
                    if assigned := _ASSIGNMENT.fullmatch(word):
                        variables[assigned[1]] = _expanded(assigned[2], variables, source)
                continue
            inner = _of_a_shell(words)
            given = _simple_commands(_expanded(inner, variables, source)) if inner is not None else ()
            for each in [_words(text, source) for text in given] or [words]:
                expanded = [part for word in each for part in _split(word, variables, arrays, source)]
                if any(word.startswith("--") or word.endswith((".yaml", ".yml")) for word in expanded):
                    started.append(expanded)
    runs = [words for words in started if _is_start(words)]
    if len(runs) != 1:
        what = "starts no run" if not runs else f"starts {len(runs)} runs"
        remedy = "Give a file with one command, such as torchrun ... train.py --model_name_or_path ..."
        raise SpecError(f"{source}: {what} that memplan can tell. {remedy}")
    return _taken_apart(runs[0], variables, source)


def _of_sbatch(text: str) -> dict[str, str]:
    """The variables that SLURM sets from a script's ``#SBATCH`` lines, which end with its first command."""
    words: list[str] = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if match := _SBATCH.match(line):
            words += match[1].partition(" #")[0].split()
    found = _of_slurm(words)
    names = {"nodes": ("SLURM_NNODES", "SLURM_JOB_NUM_NODES"), "ntasks": ("SLURM_NTASKS", "SLURM_NPROCS"),
             "per_node": ("SLURM_NTASKS_PER_NODE",), "gpus": ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE")}  # fmt: skip
    return {variable: str(count) for name, count in found.items() for variable in names[name]}


def _of_slurm(words: Sequence[str], known: Mapping[str, int] | None = None) -> dict[str, int]:
    """How much ``sbatch``, ``srun`` or ``mpirun`` are asked to start; a range of nodes, or a variable, says nothing."""
    found = dict(known or {})
    given: dict[str, str] = {}
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not equals and word[:2] in ("-N", "-n") and word[2:].isdigit():
            name, value = word[:2], word[2:]
        elif not equals:
            value = words[place + 1] if place + 1 < len(words) else ""
        name = "-n" if name in ("-np", "--np") else name
        if name in _SLURM:
            given[_SLURM[name]] = value.rsplit(":", 1)[-1]  # of gpu:a100:8
    if "ntasks" in given or "per_node" in given or "nodes" in given:
        found.pop("ntasks", None)  # what there was is of other nodes
    for name, value in given.items():
        count = _count(value)
        found.pop(name, None)
        if count is not None:
            found[name] = count
    if "nodes" in found and "per_node" in found:
        found.setdefault("ntasks", found["nodes"] * found["per_node"])
    elif "nodes" in found and "ntasks" in found and found["ntasks"] % found["nodes"] == 0:
        found["per_node"] = found["ntasks"] // found["nodes"]
    return found


def _lines(text: str) -> list[str]:
    """Commands of a script, without comments; a line ends outside of quotes and arrays, unless it goes on."""
    lines, line, quote, in_array = [], "", "", False
    text = re.sub(r"\\(?:\r?\n|\Z)", " ", text)
    index = 0
    while index < len(text):
        letter = text[index]
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and (not line.endswith("\\")):
            quote = letter
        elif letter == "#" and (not line or line[-1].isspace()):
            index = text.find("\n", index)
            if index < 0:
                break
            continue
        elif letter == "(" and line.endswith("="):
            in_array = True
        elif letter == ")":
            in_array = False
        elif letter in "\r\n" and not in_array:
            lines.append(line)
            line, index = "", index + 1
            continue
        line += letter
        index += 1
    return [stripped for each in (*lines, line) if (stripped := each.strip())]


_BLANK = "\x1f"
_TOKEN = re.compile(
    r"""(?P<quoted>\\.|'[^']*'|"(?:\\.|[^"\\])*"|\$\{[^}]*\}|<[^<>|&;\s]+>)  # <...> stands for something in a template
    |(?P<substituted>\$\(|`[^`]*`)
    |(?P<redirected>(?:&|(?<!\S)\d+)?[<>]+[&|]?\s*)
    |(?P<ended>[;|&()]+)
    |(?P<other>.)""",
    re.DOTALL | re.VERBOSE,
)


def _simple_commands(line: str) -> list[str]:
    """The commands of a line, which ``;``, ``&&``, ``|`` and the like part, without their redirections.

    What ``$(...)`` has for blanks part no words: they are ``_BLANK`` until words are made.
    """
    found, command, index, is_target = [], "", 0, False
    while match := _TOKEN.match(line, index):
        kind, text = match.lastgroup, match[0]
        if text == "$(":
            text = line[index : _closed(line, index + 1)]
        index += len(text)
        if kind == "ended":
            found.append(command)
            command, is_target = "", False
        elif kind == "redirected":
            command, is_target = f"{command} ", True
        else:
            is_target = is_target and not text.isspace()
            text = re.sub(r"\s", _BLANK, text) if kind == "substituted" else text
            command += "" if is_target else text
    return [stripped for each in (*found, command) if (stripped := each.strip())]


def _closed(text: str, index: int) -> int:
    """Where the parenthesis that opens at ``index`` has been closed; the end of a text where it is not."""
    depth = 0
    for place in range(index, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place + 1
    return len(text)


def _words(line: str, source: str) -> list[str]:
    try:
        return [word.replace(_BLANK, " ") for word in shlex.split(line, comments=True)]
    except ValueError as error:
        raise SpecError(f"{source}: is not a command: {error}. Correct it there.") from None


def _expanded(text: str, variables: Mapping[str, str], source: str) -> str:
    parts = [(variables.get(match[1] or match[3], match[2] or match[0])) for match in _VARIABLE.finditer(text)]
    if sum(map(len, parts)) > _LONGEST:
        raise SpecError(f"{source}: has a variable that grows beyond {_LONGEST} letters. Write its value out.")
    found = iter(parts)
    return _VARIABLE.sub(lambda _: next(found), text)


def _bounded(items: list[str], source: str) -> list[str]:
    """An array, which may be made of itself twice over."""
    if len(items) > _MOST_WORDS or sum(map(len, items)) > _LONGEST:
        raise SpecError(f"{source}: has an array of {len(items)} words, too many for a command. Write its values out.")
    return items


def _split(word: str, variables: Mapping[str, str], arrays: Mapping[str, list[str]], source: str) -> list[str]:
    """A word with its variables; one that is a variable alone may be several, as $OPTIONS and ${OPTIONS[@]} are."""
    if (named := _ITEMS.fullmatch(word)) and named[1] in arrays:
        return arrays[named[1]]
    expanded = _expanded(word, variables, source)
    return expanded.split() if _VARIABLE.fullmatch(word) and expanded != word else [expanded]


def _of_a_shell(words: Sequence[str]) -> str | None:
    """What a shell is given by ``bash -c``, as srun is asked to start one on each node."""
    for place in range(len(words) - 2):
        if words[place].rsplit("/", 1)[-1] in ("bash", "sh") and words[place + 1] in ("-c", "-lc"):
            return words[place + 2]
    return None


def _is_start(words: Sequence[str]) -> bool:
    bare = [word.rsplit("/", 1)[-1] for word in _without_assignments(words)]
    if not bare:
        return False
    if bare[0].startswith("--") or bare[0] in _OTHERS:
        return True
    return any(map(_is_launcher, bare if bare[0] in _WRAPPERS else bare[:12]))


def _taken_apart(words: list[str], variables: Mapping[str, str], source: str) -> Command:
    if len(words) > _MOST_WORDS:
        raise SpecError(f"{source}: has {len(words)} words, too many for a command. Give the command alone.")
    environment = {name: value for name, value in variables.items() if name.isupper()}
    while words and (match := _ASSIGNMENT.fullmatch(words[0])):
        environment[match[1]] = match[2]
        words = words[1:]
    if words and words[0].rsplit("/", 1)[-1] in _OTHERS:
        project = _OTHERS[words[0].rsplit("/", 1)[-1]]
        remedy = "Give the DeepSpeed JSON or accelerate YAML that it takes, and the rest as options."
        raise UnsupportedError(f"{source}: a command of {project} is not read: its defaults are its own. {remedy}")
    launcher, rest = _launcher(words)
    if not launcher:
        return Command("", {}, _options(rest, source), (), environment)
    wrapper = words[: len(words) - len(rest)]
    index = next((i for i, word in enumerate(rest) if _is_script(rest, i)), None)
    if index is None:
        raise SpecError(f"{source}: {launcher}: starts no script that memplan can tell. Name it, as in train.py.")
    own, script = rest[:index], rest[index + 1 :]
    files = []
    while script and not script[0].startswith("-"):
        files.append(script[0])
        script = script[1:]
    started = None
    if any(word.rsplit("/", 1)[-1] in _STARTS_SEVERAL for word in wrapper):
        started = _of_slurm(wrapper, _of_variables(environment))
    # accelerate and torchrun take dashes for underscores.
    options = {name.replace("-", "_"): value for name, value in _options(own, source).items()}
    return Command(launcher, options, _options(script, source), tuple(files), environment, started)


def _of_variables(environment: Mapping[str, str]) -> dict[str, int]:
    names = {"nodes": "SLURM_NNODES", "ntasks": "SLURM_NTASKS", "per_node": "SLURM_NTASKS_PER_NODE"}
    counts = {name: _count(environment.get(variable, "")) for name, variable in names.items()}
    return {name: count for name, count in counts.items() if count is not None}


def _launcher(words: list[str]) -> tuple[str, list[str]]:
    """The program that starts the others, and what it is given; ``srun`` and the like may stand in front."""
    for index, word in enumerate(words):
        name = word.rsplit("/", 1)[-1]
        if word.startswith("--") and index == 0:
            return "", words
        if name in _LAUNCHERS:
            rest = words[index + 1 :]
            return name, rest[1:] if name == "accelerate" and rest[:1] == ["launch"] else rest
        if re.fullmatch(r"python[\d.]*", name):
            rest = words[index + 1 :]
            if rest[:2] in (["-m", "torch.distributed.run"], ["-m", "torch.distributed.launch"]):
                return "torchrun", rest[2:]
            if rest[:2] == ["-m", "accelerate.commands.launch"]:
                return "accelerate", rest[2:]
            if rest[:2] == ["-m", "deepspeed.launcher.runner"]:
                return "deepspeed", rest[2:]
            return "python", rest
    return "", words


def _is_script(words: Sequence[str], index: int) -> bool:
    word = words[index]
    if word.endswith(".py") or (word == "train" and index == 0):
        return True
    return index > 0 and words[index - 1] in ("-m", "--module") and not word.startswith("-")


def _options(words: Sequence[str], source: str) -> dict[str, Any]:
    """``--name value``, ``--name=value``, ``--name``, which is true, and ``--no_name``; several values are a list."""
    found: dict[str, Any] = {}
    name: str | None = None
    values: list[str] = []

    def put() -> None:
        if name is None:
            return
        value: Any = True if not values else values[0] if len(values) == 1 else list(values)
        if value is True and name.startswith("no_") and name[3:] in TRAINING_ARGUMENTS:
            found[name[3:]] = False
        else:
            found[name] = _typed(name, value, source)

    for word in words:
        if word in ("&", "|", ">", ">>", "2>&1", "&&", ";", "&>", "2>"):
            break
        if re.match(r"--?[A-Za-z]", word):
            put()
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_") if name.replace("-", "_") in _TYPES else name
            values = [value] if equals else []
        else:
            values.append(word)
    put()
    return found


_TYPES = {name: key.takes for name, key in (SCRIPT_ARGUMENTS | TRAINING_ARGUMENTS).items()}


def _matters(name: str) -> bool:
    key = TRAINING_ARGUMENTS.get(name) or SCRIPT_ARGUMENTS.get(name)
    return key is not None and bool(key.field or key.only)


def plain(text: str) -> Any:
    """What a text is by itself: a number, true or false, or text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?\d{1,15}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[+-]?\d{1,15}\.?\d{0,15}(?:[eE][+-]?\d{1,3})?", text) else text


def _typed(name: str, value: Any, source: str) -> Any:
    """A text as the field's type; one with a variable of the shell stays text, and is told apart where it matters."""
    kind = _TYPES.get(name)
    if isinstance(value, list) and kind in (bool, int, float) and _matters(name):
        raise SpecError.at(f"{source}: {name}", " ".join(value), "is more than one value", "Write one.")
    if not isinstance(value, str) or kind in (str, dict):
        return value
    if kind is None:
        return plain(value)
    if kind is list:
        return value.split(",")
    if kind is bool:
        if value.lower() not in _TRUTH and not _matters(name):
            return value
        if value.lower() not in _TRUTH:
            raise SpecError.at(f"{source}: {name}", value, "is neither true nor false", "Write one of them.")
        return _TRUTH[value.lower()]
    try:
        number = float(value)
    except ValueError:
        problem = "is a variable of the shell" if "$" in value else "is not a number"
        if not _matters(name):
            return value
        raise SpecError.at(f"{source}: {name}", value, problem, "Write the number.") from None
    return int(number) if kind is int and number.is_integer() else number
