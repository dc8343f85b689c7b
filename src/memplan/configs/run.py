"""What the files of a run say: any of them, told apart by what is in them, and merged into one setup.

A DeepSpeed JSON, an accelerate YAML, TrainingArguments (JSON, YAML, a list, a command that starts a script), a
LLaMA-Factory YAML, or a folder that a plan has written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.answers import Finding
from memplan.configs import llama_factory
from memplan.configs.accelerate import of_options, parse_accelerate
from memplan.configs.argument_keys import REMOVED_ARGUMENTS, SCRIPT_ARGUMENTS, TRAINING_ARGUMENTS
from memplan.configs.arguments import fsdp_config, parse_arguments
from memplan.configs.command import Command, is_command, parse_command, plain
from memplan.configs.deepspeed import parse_deepspeed
from memplan.configs.files import ANCESTORS, is_there, parse_mapping, read_mapping, read_text, refuse_outside
from memplan.configs.keys import ACCELERATE, DEEPSPEED
from memplan.configs.setup import Batch, EngineConfig, batch_finding, in_keys, merged, of_file, with_training
from memplan.errors import MemplanError, ResolutionError, SpecError, UnsupportedError, short
from memplan.results import (
    Assumption,
)
from memplan.specs.hardware import LARGEST_CLUSTER
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec

__all__ = [
    "Run",
    "Values",
    "as_written",
    "is_arguments",
    "of_texts",
    "ranks_of_batch",
    "read_folder",
    "read_run",
    "setup_of",
    "usual_nodes",
]

_ALLOCATOR = re.compile(
    r'^export PYTORCH_(?:CUDA_)?ALLOC_CONF="\$\{PYTORCH_(?:CUDA_)?ALLOC_CONF:-([^}"]*)\}"$', re.MULTILINE
)
_EXPORT = re.compile(r'^export (\w+)="\$\{\w+:-([^}"]*)\}"', re.MULTILINE)
_PRECISION = "ACCELERATE_MIXED_PRECISION"
"""What ``accelerate launch`` hands ``mixed_precision`` over in, and TrainingArguments that ask for none take."""
_UNSEEN = "accelerate launch takes what its options leave open from the machine's own default config, which is not read"
_ACCELERATE_ONLY = frozenset(ACCELERATE[""]) - {"fsdp_config", "debug", "fp16"}
_DEEPSPEED_ONLY = frozenset(DEEPSPEED[""]) - TRAINING_ARGUMENTS.keys() - {"bf16", "fp16", "optimizer", "scheduler"}
_ARGUMENTS_ONLY = (TRAINING_ARGUMENTS.keys() | SCRIPT_ARGUMENTS.keys()) - DEEPSPEED[""].keys() - {"fsdp_config"}
_AXOLOTL = frozenset({"base_model", "sequence_len", "adapter", "val_set_size", "sample_packing", "micro_batch_size"})


@dataclass(frozen=True, slots=True)
class Values:
    """A file's values, and its name in messages."""

    source: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """What files say of a run, not yet merged."""

    source: str
    """What was given."""
    engine: EngineConfig | None = None
    """DeepSpeed, FSDP or DDP as a config asks for it; None is whatever the launcher starts."""
    arguments: EngineConfig | None = None
    """TrainingArguments; None where the files have none."""
    model: str | None = None
    cluster: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """``gpus`` and ``nodes``, as far as a launcher is told; ``per_node``, where it is told no more."""
    alloc_conf: str | None = None
    raw: Mapping[str, Values] = dataclasses.field(default_factory=dict)
    """Values as they are written, by the names ``arguments``, ``deepspeed`` and ``accelerate``."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Variables that the launching script sets."""
    launcher: str = ""
    """accelerate, deepspeed, torchrun or python, where that is known."""
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()


def read_run(config: object, source: str = "values") -> Run:
    """Read the files of a run: a path, values, or a list of arguments; ``source`` is what messages call values.

    Raises SpecError and UnsupportedError.
    """
    if isinstance(config, Mapping):
        for key in config:
            if not isinstance(key, str):
                raise SpecError.at("path", key, "is a key that is not text", "Write the name of a setting.")
        return _of_values(Values(source, config), None)
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        return read_folder(path) if is_there(path) and path.is_dir() else _of_file_at(path)
    if isinstance(config, Sequence) and not isinstance(config, (bytes, bytearray)):
        words = [str(word) for word in config]
        return _of_command(parse_command(words, "arguments"), Values("arguments", {}), None)
    remedy = "Give a path, the values of a file, or a list of arguments."
    raise SpecError.at("path", config, "is nothing that a run is started with", remedy)


def _of_file_at(path: Path) -> Run:
    text = read_text(path, "path")
    source = str(path)
    if is_command(text):
        return _of_command(parse_command(text, source), Values(source, {}), path.parent)
    return _of_values(Values(source, parse_mapping(text, source)), path.parent)


# -- by kind -----------------------------------------------------------------------------------------------------------


def _of_values(values: Values, folder: Path | None) -> Run:
    data = values.data
    kind = _kind(values)
    if kind == "accelerate":
        return _of_accelerate(values, folder)
    if kind == "deepspeed":
        findings: list[Finding] = []
        engine = parse_deepspeed(data, values.source, findings=findings)
        return Run(values.source, engine, raw={"deepspeed": values}, findings=tuple(findings))
    return _of_arguments(values, folder, Run(values.source))


def is_arguments(data: Mapping[str, Any]) -> bool:
    """Whether values are TrainingArguments, or LLaMA-Factory's."""
    try:
        return _kind(Values("values", data)) == "arguments"
    except MemplanError:
        return False


def _kind(values: Values) -> str:
    """``accelerate``, ``deepspeed`` or ``arguments``. Raises SpecError for what is none of them."""
    data, source = values.data, values.source
    keys = data.keys()
    zero = isinstance(data.get("zero_optimization"), (Mapping, bool))
    if "distributed_type" in keys or ("compute_environment" in keys and not zero):
        return "accelerate"
    if "base_model" in keys and len(_AXOLOTL & keys) > 1:
        remedy = "Check the DeepSpeed JSON that it names, with --model, --micro-batch-size and --seq-len."
        raise UnsupportedError(f"{source}: an axolotl config is not read. {remedy}")
    if llama_factory.is_of_version_1(data):
        remedy = "Say what it asks for in the names of TrainingArguments."
        raise UnsupportedError(f"{source}: a config of LLaMA-Factory's v1 is not read. {remedy}")
    if llama_factory.is_llama_factory(data) and not zero:
        return "arguments"
    engine = len(_DEEPSPEED_ONLY & keys)
    if _of_a_trainer(keys) and not zero and len(_ARGUMENTS_ONLY & keys) > engine:
        return "arguments"
    known = engine + sum(isinstance(data.get(name), Mapping) for name in ("bf16", "fp16", "optimizer", "scheduler"))
    if zero or _SURE_OF_DEEPSPEED & keys or (known and 2 * known >= len(keys)):
        return "deepspeed"
    if _ACCELERATE_ONLY & keys:
        return "accelerate"  # which says what is missing
    if "architectures" in keys or "model_type" in keys:
        remedy = f"Check the files of a run with it: --model {source}."
        raise SpecError(f"{source}: is a model's config, not a run's. {remedy}")
    if any(name.removeprefix("fsdp_") in _FSDP_NAMES for name in keys):
        remedy = "Give the TrainingArguments that name it, or an accelerate YAML."
        raise SpecError(f"{source}: is a Trainer's fsdp_config, which is no run by itself. {remedy}")
    if keys and 2 * sum(map(_resembles, keys)) >= len(keys):
        return "deepspeed"  # which names the key that is misspelt
    names = ", ".join(map(short, list(keys)[:5])) or "nothing"
    remedy = "Give a DeepSpeed JSON, an accelerate YAML, TrainingArguments, a LLaMA-Factory YAML or a plan's folder."
    raise SpecError(f"{source}: holds {names}, which is no config of a run. {remedy}")


def _of_a_trainer(keys: Collection[str]) -> bool:
    """Whether names are a Trainer's arguments: others have a learning_rate, a seed and an output_dir too."""
    if "per_device_train_batch_size" in keys:
        return True
    known = [name for name in keys if name in _NAMES]
    return len(known) >= 2 and 2 * len(known) >= len(keys) and bool(_SURE.intersection(known))


_NAMES = TRAINING_ARGUMENTS.keys() | SCRIPT_ARGUMENTS.keys() | REMOVED_ARGUMENTS.keys()
_SURE = frozenset(
    {
        *("gradient_accumulation_steps", "num_train_epochs", "max_steps", "per_device_eval_batch_size", "deepspeed"),
        *("bf16", "fp16", "fsdp", "optim", "lr_scheduler_type", "save_strategy", "eval_strategy", "model_name_or_path"),
        *("gradient_checkpointing", "activation_checkpointing", "logging_steps", "warmup_steps", "output_dir"),
    }
)
"""Names of which one at least is among TrainingArguments."""
_KINDS = {"accelerate": "accelerate launch's config", "deepspeed": "DeepSpeed's config"}
_SURE_OF_DEEPSPEED = frozenset(
    {"train_batch_size", "train_micro_batch_size_per_gpu", "steps_per_print", "zero_allow_untested_optimizer"}
)
_FSDP_NAMES = ("transformer_layer_cls_to_wrap", "auto_wrap_policy", "reshard_after_forward", "sharding_strategy", "xla")


def _resembles(name: str) -> bool:
    import difflib

    return bool(difflib.get_close_matches(name.lower(), _DEEPSPEED_ONLY, n=1, cutoff=0.8))


def _of_accelerate(values: Values, folder: Path | None) -> Run:
    findings: list[Finding] = []
    engine = parse_accelerate(values.data, values.source, folder, findings)
    raw = {"accelerate": values}
    section = values.data.get("deepspeed_config")
    named = section.get("deepspeed_config_file") if isinstance(section, Mapping) else None
    if isinstance(named, str):
        raw["deepspeed"] = _file(named, values.source, "deepspeed_config_file", folder, [])
    return Run(values.source, engine, raw=raw, launcher="accelerate", findings=tuple(findings))


def _of_arguments(values: Values, folder: Path | None, run: Run) -> Run:
    """TrainingArguments, and the engine that they or the launcher ask for."""
    findings, notes = list(run.findings), list(run.notes)
    data: dict[str, Any] = dict(values.data)
    raw = {**run.raw, "arguments": values}
    engine = run.engine
    for field in ("deepspeed", "fsdp_config"):
        if isinstance(data.get(field), str):
            data[field] = _referenced(data[field], values.source, field, folder, notes, raw)
    if data.get("deepspeed"):
        if data.get("fsdp"):
            raise SpecError.at(f"{values.source}: fsdp", data["fsdp"], "stands beside deepspeed", "Use one of them.")
        if not isinstance(data["deepspeed"], Mapping):
            where = f"{values.source}: deepspeed"
            raise SpecError.at(where, data["deepspeed"], "is neither a path nor an object", "Give one of them.")
        source = raw["deepspeed"].source if "deepspeed" in raw else f"{values.source}: deepspeed"
        raw.setdefault("deepspeed", Values(source, data["deepspeed"]))
        engine = parse_deepspeed(data["deepspeed"], source, trainer=True, findings=findings)
    elif data.get("fsdp") or data.get("fsdp") == "":
        fields = fsdp_config(data, values.source, findings)
        engine = EngineConfig(values.source, fields, keys={"fsdp.": "fsdp_config."})
    shards = engine is not None and engine.strategy.get("kind") in ("zero3", "fsdp")
    known: tuple[str, ...] = ()
    if llama_factory.is_llama_factory(data):
        data = llama_factory.to_arguments(data, values.source, shards=shards)
        known = llama_factory.known_names()
    arguments = parse_arguments(data, values.source, findings, known=known)
    if known:
        arguments = dataclasses.replace(arguments, keys={**arguments.keys, **llama_factory.KEYS})
    name = data.get("model_name_or_path")
    model = name if isinstance(name, str) and name else run.model
    return dataclasses.replace(
        run, engine=engine, arguments=arguments, model=model, raw=raw, findings=tuple(findings), notes=tuple(notes)
    )


def _of_command(command: Command, values: Values, folder: Path | None) -> Run:
    cluster, notes = command.cluster, list[str]()
    if command.unknown_nodes is not None:
        notes.append(f"{values.source}: how many nodes there are ({command.unknown_nodes}) is not known: give --nodes")
        if "gpus" in cluster:
            cluster["nodes"] = usual_nodes(cluster["gpus"])
    hostfile = command.options.get("hostfile", command.options.get("H"))
    if command.launcher == "deepspeed" and isinstance(hostfile, str):
        cluster = _of_hostfile(hostfile, command, values.source, folder, notes)
    run = Run(values.source, cluster=cluster, environment=command.environment, launcher=command.launcher)
    run = dataclasses.replace(run, alloc_conf=_allocator_of(command.environment), notes=tuple(notes))
    if command.launcher == "accelerate":
        run = _launched(run, command, values, folder)
    arguments = dict(command.arguments)
    if command.launcher and arguments.get("deepspeed") is True:
        return _of_deepspeeds_own(run, arguments, values, folder)
    named, given = command.files[0] if command.files else "", command.files[1:]
    field = command.launcher
    if not named.endswith((".yaml", ".yml", ".json")):
        # TRL's parser, alignment-handbook's too, takes --config for a file of arguments, over which others win.
        named, given, field = str(arguments.get("config", "")), (), "config"
        named = named if named.endswith((".yaml", ".yml")) else ""
    if named:
        arguments.pop("config", None)
        file = _file(named, values.source, field, folder, [])
        pairs = {name: plain(value) for name, equals, value in (part.partition("=") for part in given) if equals}
        merged_values = Values(file.source, {**file.data, **pairs, **arguments})
        kind = _kind(merged_values)
        if kind != "arguments":
            raise SpecError(f"{file.source}: holds no arguments of a script, but {_KINDS[kind]}. Check it by itself.")
        return _of_arguments(merged_values, Path(file.source).parent, run)
    if "$" in str(arguments.get("model_name_or_path")):
        del arguments["model_name_or_path"]  # a variable of the shell: --model has to say
    if not _of_a_trainer(arguments) and not llama_factory.is_llama_factory(arguments):
        if run.engine is not None:
            return run
        names = ", ".join(list(arguments)[:5]) or "nothing"
        remedy = (
            "Give a command with TrainingArguments, or the DeepSpeed JSON or accelerate YAML that the script takes."
        )
        raise SpecError(f"{values.source}: starts a script with {names}, which are no TrainingArguments. {remedy}")
    return _of_arguments(Values(values.source, arguments), folder, run)


_HOST = re.compile(r"(\S+)\s+slots=([0-9]{1,9})")


def _of_hostfile(named: str, command: Command, source: str, folder: Path | None, notes: list[str]) -> dict[str, int]:
    """The ranks that ``deepspeed --hostfile`` starts, as ``fetch_hostfile`` and ``apply_num_nodes_and_gpus`` have it.

    Empty where the file is not here, or not all that decides. Raises SpecError for a file that DeepSpeed refuses.
    """
    said = command.cluster
    if "gpus" in said and command.nodes is not None:
        return said
    if {"include", "exclude"} & command.options.keys():
        return {}
    try:
        path = _found(named, source, "hostfile", folder, notes)
    except SpecError:
        notes.append(f"{source}: hostfile: {named} is not here to be read: give --gpus and --nodes")
        return {}
    hosts: dict[str, int] = {}
    for line in read_text(path, f"{source}: hostfile").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _HOST.match(line)
        if match is None or match[1] in hosts:
            problem = "names a host twice" if match is not None else "is no line of a hostfile"
            raise SpecError.at(str(path), line, f"{problem}, which DeepSpeed refuses", "Write worker-1 slots=8.")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise SpecError(f"{path}: names no host, which DeepSpeed refuses. Write worker-1 slots=8.")
    asked = {name: command.options[name] for name in ("num_nodes", "num_gpus") if name in command.options}
    if not all(isinstance(each, int) and each > 0 for each in asked.values()):
        return {}
    slots = list(hosts.values())[: asked.get("num_nodes")]
    slots = [asked["num_gpus"]] * len(slots) if "num_gpus" in asked else slots
    if len(set(slots)) > 1:
        notes.append(f"{path}: nodes with different numbers of GPUs are not modelled: give --gpus and --nodes")
        return {}
    return {"gpus": sum(slots), "nodes": len(slots)} if slots[0] else {}


def _launched(run: Run, command: Command, values: Values, folder: Path | None) -> Run:
    """What ``accelerate launch`` starts: its options win over the config that they name."""
    named = Values(values.source, {})
    file = command.options.get("config_file")
    if isinstance(file, str):
        named = _file(file, values.source, "config_file", folder, [])
    unknown = {name: value for name, value in command.options.items() if "$" in str(value)}
    config = of_options({k: v for k, v in command.options.items() if k not in unknown}, named.data)
    precision = config.get("mixed_precision") or command.options.get("mixed_precision")
    if precision:
        run = dataclasses.replace(run, environment={**run.environment, _PRECISION: str(precision).lower()})
    if not named.data and "distributed_type" not in config:
        parse_accelerate({**config, "distributed_type": "NO"}, named.source)  # which says what is wrong
        return dataclasses.replace(run, notes=(*run.notes, _UNSEEN))
    started = _of_accelerate(Values(named.source, config), folder)
    engine = started.engine
    if engine is not None and not named.data:  # it takes as many processes as there are GPUs
        engine = dataclasses.replace(engine, refused={k: v for k, v in engine.refused.items() if k != "gpus"})
    count = next((name for name in ("num_processes", "num_machines") if name in unknown), None)
    if engine is not None and count is not None:
        problem, remedy = "is a variable of the shell, which is not known", "Give --gpus and --nodes."
        value = unknown[count] if isinstance(unknown[count], str) else " ".join(map(str, unknown[count]))
        refused = SpecError.at(f"{values.source}: {count}", value, problem, remedy)
        kept = {name: value for name, value in engine.cluster.items() if name not in ("gpus", "nodes")}
        engine = dataclasses.replace(engine, cluster=kept, refused={**engine.refused, "gpus": refused})
    cluster = {**(engine.cluster if engine else {}), **run.cluster}
    run = run if named.data else dataclasses.replace(run, notes=(*run.notes, _UNSEEN))
    return dataclasses.replace(run, engine=engine, raw=started.raw, findings=started.findings, cluster=cluster)


def _of_deepspeeds_own(run: Run, arguments: Mapping[str, Any], values: Values, folder: Path | None) -> Run:
    """``--deepspeed --deepspeed_config FILE``, as ``deepspeed.add_config_arguments`` has it: no Trainer."""
    named = arguments.get("deepspeed_config")
    if not isinstance(named, str):
        remedy = "Give the DeepSpeed JSON of the script instead."
        raise SpecError(f"{values.source}: deepspeed: is a flag, and there is no deepspeed_config. {remedy}")
    config, findings = _file(named, values.source, "deepspeed_config", folder, []), list[Finding]()
    engine = parse_deepspeed(config.data, config.source, findings=findings)
    model = arguments.get("model_name_or_path")
    return dataclasses.replace(
        run,
        engine=engine,
        model=model if isinstance(model, str) and "$" not in model else None,
        raw={"deepspeed": config},
        findings=tuple(findings),
        notes=(f"{values.source}: of the script's own arguments none but the model is read",),
    )


def _allocator_of(environment: Mapping[str, str]) -> str | None:
    return environment.get("PYTORCH_ALLOC_CONF") or environment.get("PYTORCH_CUDA_ALLOC_CONF")


def _referenced(
    name: str, source: str, field: str, folder: Path | None, notes: list[str], raw: dict[str, Values]
) -> Mapping[str, Any] | str | None:
    """A file that arguments name."""
    if not name:
        return None
    if name.lstrip().startswith("{"):
        return parse_mapping(name, f"{source}: {field}")
    found = _file(name, source, field, folder, notes)
    if field == "deepspeed":
        raw["deepspeed"] = found
    return found.data


def _file(name: str, source: str, field: str, folder: Path | None, notes: list[str]) -> Values:
    """What is in a file that another one names."""
    path = _found(name, source, field, folder, notes)
    data, _ = read_mapping(path, f"{source}: {field}")
    return Values(str(path), data)


def _found(name: str, source: str, field: str, folder: Path | None, notes: list[str]) -> Path:
    """A file that another one names: from the folder a run is started in, or one above the file that names it."""
    path, roots = Path(name), list[Path]()
    if "$" in name:
        remedy = "Write the path out."
        raise SpecError.at(f"{source}: {field}", name, "has a variable of the shell, which is not known", remedy)
    if not is_there(path) and folder is not None and not path.is_absolute():
        above = [folder, *folder.absolute().parents][:ANCESTORS]
        root = next((each for each in above if each != each.parent and is_there(each / path)), None)
        if root is not None:
            notes.append(f"{name} is read as {root / path}; a run looks for it in the folder it is started in")
            path, roots = root / path, [root]
    if not is_there(path):
        remedy = "Check from the folder that the run is started in."
        raise SpecError.at(f"{source}: {field}", name, "does not exist", remedy)
    if folder is not None:
        refuse_outside(path, folder, f"{source}: {field}", roots)
    return path


# -- a plan's folder ---------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> Run:
    """Read a folder that a plan has written. Raises SpecError."""
    if not folder.is_dir():
        raise SpecError.at("folder", str(folder), "is not a folder", "Give one that memplan has written.")
    names = [name for name in ("training_args.json", "accelerate.yaml", "launch.sh") if (folder / name).exists()]
    if "training_args.json" not in names:
        others = sorted(path.name for path in folder.glob("*") if path.suffix in _SUFFIXES)[:5]
        remedy = "Give a folder that memplan has written"
        remedy += f", or the file in it that starts the run, such as {folder / others[0]}." if others else "."
        raise SpecError(f"{folder / 'training_args.json'}: missing. {remedy}")
    found = {name: read_text(folder / name, "path") for name in names}
    if "training_args.json" in found:
        named = _named(found["training_args.json"])
        if named is not None and is_there(folder / named):
            refuse_outside(folder / named, folder, f"{folder / 'training_args.json'}: deepspeed")
            found[named] = read_text(folder / named, "path")
    return of_texts(found, f"{folder}{os.sep}", folder)


_SUFFIXES = frozenset({".sh", ".slurm", ".sbatch", ".yaml", ".yml", ".json"})


def _named(text: str) -> str | None:
    try:
        named = json.loads(text)["deepspeed"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None  # who parses it says what is wrong
    return named if isinstance(named, str) and named else None


def of_texts(files: Mapping[str, str], source: str = "", folder: Path | None = None) -> Run:
    """Read the files of a folder, as text by name; ``source`` is put before the names in messages. Raises SpecError.

    What they name beside is looked for in ``folder``.
    """

    def values(name: str) -> Values:
        if name not in files:
            raise SpecError(f"{source}{name}: missing. Give a folder that memplan has written.")
        return Values(f"{source}{name}", parse_mapping(files[name], f"{source}{name}"))

    given = values("training_args.json")
    name = given.data.get("model_name_or_path")
    if not isinstance(name, str) or not name:
        raise SpecError(f"{given.source}: model_name_or_path: missing. Give a hub id or a folder.")
    script = files.get("launch.sh", "")
    per_node, nodes = (_count(script, key, source) for key in ("GPUS_PER_NODE", "NODES"))
    run = Run(
        source or "values",
        cluster={"gpus": per_node * nodes, "nodes": nodes},
        environment=dict(_EXPORT.findall(script)),
        launcher="deepspeed" if given.data.get("deepspeed") else "accelerate",
    )
    allocator = _ALLOCATOR.search(script)
    if allocator is not None:
        run = dataclasses.replace(run, alloc_conf=allocator[1])
    data = dict(given.data)
    if isinstance(data.get("deepspeed"), str):
        named = values(data["deepspeed"])
        data["deepspeed"] = dict(named.data)
        run = dataclasses.replace(run, raw={"deepspeed": named})
    elif "accelerate.yaml" in files and "--config_file accelerate.yaml" in script:
        config, findings = values("accelerate.yaml"), list[Finding]()
        engine = parse_accelerate(config.data, config.source, findings=findings)
        run = dataclasses.replace(run, engine=engine, raw={"accelerate": config}, findings=tuple(findings))
    else:
        engine = EngineConfig(source, {"kind": "single"})
        run = dataclasses.replace(run, engine=engine, launcher="python")
    return _of_arguments(Values(given.source, data), folder, run)


def _count(text: str, key: str, source: str) -> int:
    match = re.search(rf"^{key}=(\d{{1,12}})$", text, re.MULTILINE)
    if match is None or int(match[1]) == 0:
        raise SpecError(f"{source}launch.sh: {key}: missing. Write {key}=1, or as many as there are.")
    return int(match[1])


# -- one setup ---------------------------------------------------------------------------------------------------------


def setup_of(
    run: Run, training: TrainingSpec, strategy: Mapping[str, Any], gpus: int, findings: list[Finding] | None = None
) -> tuple[TrainingSpec, Strategy, tuple[Assumption, ...]]:
    """Return what a run trains and how it is spread on ``gpus`` ranks, and what is to be said about it.

    What ``training`` and ``strategy`` say wins over the files. With ``findings``, a batch that is not the product of
    its parts joins them; without it is an error. Raises SpecError and UnsupportedError.
    """
    engine = run.engine
    if engine is None:
        launched = run.environment.get(_PRECISION)
        precision = {"mixed_precision": launched} if launched in ("bf16", "fp16") else {}
        engine = EngineConfig(run.source, {"kind": "ddp" if gpus > 1 else "single"}, precision)
    notes: list[Assumption] = []
    if run.arguments is not None:
        training, engine, notes = _of_trainer(run, run.arguments, engine, training)
        ddp = run.arguments.strategy.get("ddp")
        if ddp is not None and engine.strategy.get("kind") == "ddp":
            keys = {**engine.keys, **run.arguments.keys}
            engine = dataclasses.replace(engine, strategy={**engine.strategy, "ddp": ddp}, keys=keys)
    elif findings is not None:
        engine = dataclasses.replace(engine, batch=_asked_of_the_trainer(engine.batch, training))
        found = batch_finding(engine, training, gpus)
        if found is not None:
            findings.append(found)
            engine = dataclasses.replace(engine, batch=_without_total(engine.batch or Batch(), gpus))
    merged_training, merged_strategy, said = with_training(engine, training, strategy, gpus)
    parts = (run.arguments, engine) if run.arguments is not None else (engine,)
    return merged_training, merged_strategy, (*notes, *(each for part in parts for each in part.assumptions), *said)


def ranks_of_batch(run: Run, training: TrainingSpec) -> int | None:
    """The ranks on which a DeepSpeed config's ``train_batch_size`` is the product of its parts, where all are said.

    The Trainer's arguments say the parts where there are any; what the files leave open, ``training`` may say.
    """
    batch = None if run.engine is None else run.engine.batch
    if batch is None or batch.train is None:
        return None
    own = {"micro_batch_size": batch.micro, "grad_accum_steps": batch.steps}
    product = 1
    for name, number in own.items():
        if run.arguments is not None:
            number = run.arguments.training.get(name)
        elif number is None and name in training.model_fields_set:
            number = getattr(training, name)
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            return None
        product *= number
    ranks, rest = divmod(batch.train, product)
    return ranks if not rest and ranks <= LARGEST_CLUSTER else None


def usual_nodes(ranks: int) -> int:
    """The nodes that so many ranks are on, as few as can be with equal numbers and at most 8 GPUs of each."""
    return ranks // max(each for each in range(1, 9) if ranks % each == 0)


def as_written(run: Run, training: TrainingSpec, error: SpecError | UnsupportedError) -> SpecError | UnsupportedError:
    """An error of the estimate about what the arguments say, in their words; ``training`` is what options say."""
    arguments, engine = run.arguments, run.engine
    field = str(error).partition(":")[0]
    top = "lora" if field == "lora_targets" else field.partition(".")[0]
    if isinstance(error, ResolutionError) or top in training.model_fields_set:
        return error
    if arguments is not None and top in arguments.training:
        said, key = in_keys(arguments, str(error)), arguments.keys.get(field)
        if key == llama_factory.KEYS.get(field) and key not in run.raw["arguments"].data:
            value = f"{arguments.training[top]}"
            said = said.replace(f"{key}: {value} ", f"{key}: {value}, LLaMA-Factory's default, ", 1)
        return type(error)(said)
    nested = [] if engine is None else [name for name in engine.keys if name.endswith(".")]
    section = next((name for name in nested if engine and field in engine.strategy.get(name[:-1], ())), None)
    if section is not None:  # estimates call it by its last name
        error = type(error)(f"{section}{error}")
        field = f"{section}{field}"
    if engine is not None and any(field.startswith(name) for name in nested):
        return type(error)(in_keys(engine, str(error)))
    return error


def _without_total(batch: Batch, gpus: int) -> Batch:
    """The batch as DeepSpeed would share its total out, rounded down, where it is no product of its parts."""
    micro = batch.micro
    if micro is None and "micro_batch_size" not in batch.automatic and batch.train is not None:
        micro = max(1, batch.train // gpus // (batch.steps or 1))
    return dataclasses.replace(batch, train=None, micro=micro)


def _asked_of_the_trainer(batch: Batch | None, training: TrainingSpec) -> Batch | None:
    """What a Trainer has to be asked for, if train_batch_size is fixed, and its parts are ``auto``."""
    if batch is None or batch.train is None:
        return batch
    return dataclasses.replace(batch, automatic=batch.automatic & training.model_fields_set)


def _of_trainer(
    run: Run, arguments: EngineConfig, engine: EngineConfig, training: TrainingSpec
) -> tuple[TrainingSpec, EngineConfig, list[Assumption]]:
    """The training of TrainingArguments, and the engine's config without what the Trainer decides."""
    fixed = dict(arguments.training)
    of_engine = dict(engine.training)
    if run.alloc_conf:
        fixed["alloc_conf"] = run.alloc_conf
    if "optim" in of_engine:  # DeepSpeed makes it, and the Trainer makes none (deepspeed_optim_sched)
        fixed.pop("optim", None)
    if fixed.get("mixed_precision") == "no" and run.launcher == "accelerate" and "deepspeed" not in run.raw:
        fixed.pop("mixed_precision")  # ACCELERATE_MIXED_PRECISION, which the launcher sets, is what counts then
        of_engine.setdefault("mixed_precision", "no")
    else:
        of_engine.pop("mixed_precision", None)
    changes, notes = merged(arguments, fixed, training)
    training = of_file(arguments, lambda: training.replace(**changes))
    # The Trainer's batch is that of its arguments; another one in the file is refused (trainer_config_finalize).
    automatic = Batch(automatic=frozenset({"micro_batch_size", "grad_accum_steps"}))
    assumed = {name: value for name, value in engine.assumed.items() if name not in training.model_fields_set}
    batch = None if engine.batch is None else automatic
    return training, dataclasses.replace(engine, training=of_engine, assumed=assumed, batch=batch), notes
