"""The command line: parse, call :mod:`memplan.api`, render, exit.

Options arrive as text and are checked by the specs, so that a wrong value has one message wherever it comes from.
What renders, and what only some commands need, is imported when it is used: an answer in JSON loads none of it.
"""

from __future__ import annotations

import gc
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from memplan.results import Estimate, EstimateList, Verdict
    from memplan.specs.hardware import ClusterSpec
    from memplan.specs.strategy import Strategy
    from memplan.specs.training import TrainingSpec

__all__ = ["OPTIONS", "Option", "app", "main"]

EXIT_CODES: dict[Verdict, int] = {"fits": 0, "unknown": 0, "does-not-fit": 1, "tight": 3}
BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
READER_GONE = 141  # 128 + SIGPIPE
INTERNAL = 70  # EX_SOFTWARE of sysexits.h


@dataclass(frozen=True, slots=True)
class Option:
    """An option of the commands that estimate."""

    name: str
    """The name of its field, with underscores: an option is written with dashes."""
    metavar: str
    """What its value looks like; empty for a switch."""
    help: str
    panel: str
    """The heading that ``--help`` has it under."""
    off: str = ""
    """The opposite of a switch, if there is one."""

    @property
    def flag(self) -> str:
        """As it is typed."""
        return f"--{self.name.replace('_', '-')}"


_HARDWARE, _SPREAD, _RUN, _ADAPTERS, _TASK, _ANSWER = (
    "Hardware", "How the run is spread", "The run", "Adapters and quantization", "Loading and generation", "The answer",
)  # fmt: skip

OPTIONS: tuple[Option, ...] = (
    Option("gpus", "N", "Data-parallel ranks in total (default: 1, or this machine's GPUs).", _HARDWARE),
    Option("nodes", "M", "Machines; divides --gpus (default: 1).", _HARDWARE),
    Option("gpu", "NAME", "A GPU as in `memplan gpus`, or cpu (default: this machine's).", _HARDWARE),
    Option("gpu_memory", "GIB", "Memory of one GPU, in place of the catalog's.", _HARDWARE),
    Option("host_memory", "GIB", "RAM of one node.", _HARDWARE),
    Option("nvme", "GIB", "NVMe of one node.", _HARDWARE),
    Option("nvme_path", "DIR", "Folder on the NVMe, to offload to.", _HARDWARE),
    Option(
        "strategy",
        "single|ddp|zero0|zero1|zero2|zero3|fsdp",
        "One engine; without it every rung of the ladder is answered.",
        _SPREAD,
    ),
    Option("offload_optimizer", "none|cpu|nvme", "Where optimizer states live (default: none).", _SPREAD),
    Option("offload_param", "none|cpu|nvme", "Where sharded parameters live (default: none).", _SPREAD),
    Option("engine_config", "FILE", "A DeepSpeed JSON or accelerate YAML.", _SPREAD),
    Option(
        "dtype",
        "auto|float32|bfloat16|float16",
        "What from_pretrained loads; auto is the checkpoint's (default: float32, with DeepSpeed the 16-bit type).",
        _RUN,
    ),
    Option(
        "mixed_precision",
        "no|bf16|fp16",
        "As TrainingArguments sets it (default: bf16, on a GPU without it fp16).",
        _RUN,
    ),
    Option("micro_batch_size", "B", "Sequences per GPU in one forward (default: 1).", _RUN),
    Option("seq_len", "S", "Tokens per sequence (default: 2048).", _RUN),
    Option("grad_accum_steps", "A", "Micro-batches per optimizer step (default: 1).", _RUN),
    Option("optim", "NAME", "As in TrainingArguments (default: adamw_torch_fused).", _RUN),
    Option("packed", "", "Full sequences without a mask, or padded ones (default: packed).", _RUN, off="padded"),
    Option("attn", "eager|sdpa|flash_attention_2", "Attention implementation (default: sdpa).", _RUN),
    Option(
        "gradient_checkpointing",
        "",
        "Keep each block's input only, and run the block again in the backward (default: off).",
        _RUN,
        off="no-gradient-checkpointing",
    ),
    Option("liger", "", "Liger's fused loss (default: off).", _RUN, off="no-liger"),
    Option(
        "head",
        "causal-lm|base|sequence-classification|seq2seq-lm|image-classification",
        "What stands on the model (default: what the config's architecture says).",
        _RUN,
    ),
    Option("vocab_size", "V", "Resize the embeddings to this (default: the config's).", _RUN),
    Option("eval_batch_size", "E", "Sequences per GPU in evaluation (default: no evaluation).", _RUN),
    Option("lora_rank", "R", "Train LoRA adapters of this rank.", _ADAPTERS),
    Option("lora_targets", "NAMES", "Modules with adapters, as in q_proj,v_proj (default: PEFT's mapping).", _ADAPTERS),
    Option("lora_dropout", "P", "Dropout of the adapters (default: 0).", _ADAPTERS),
    Option("quantization", "none|int8|nf4|nf4-dq", "Quantize the frozen weights (default: none).", _ADAPTERS),
    Option("task", "train|load|generate", "What the run does (default: train).", _TASK),
    Option("device_map", "auto|balanced|balanced_low_0|sequential", "How loading spreads layers over devices.", _TASK),
    Option("max_new_tokens", "T", "Tokens to generate after a prompt of --seq-len.", _TASK),
    Option("software", "NAME=VERSION,...", "Library versions, as in transformers=5.23,torch=2.13.", _ANSWER),
    Option("trace", "", "Trace the real model; needs the train extra.", _ANSWER),
    Option("no_replay", "", "Skip the caching allocator: an upper bound on reserved memory, sooner.", _ANSWER),
    Option("explain", "", "Every term: formula, numbers, source.", _ANSWER),
    Option("json", "", "The answer as JSON.", _ANSWER),
)
"""The options of the commands that estimate, in the order of their help."""

_PATHS = {option.name: option.flag for option in OPTIONS} | {
    "kind": "--strategy",
    "packed": "--packed/--padded",
    "lora.rank": "--lora-rank",
    "lora.targets": "--lora-targets",
    "lora.dropout": "--lora-dropout",
    "quantization.kind": "--quantization",
}
"""A field's path, as an error names it -> the option that sets it."""

_INTEGER = re.compile(r"[+-]?\d{1,40}")
_CLUSTER = ("gpu", "gpus", "nodes", "gpu_memory", "host_memory", "nvme", "nvme_path")
_STRATEGY = ("strategy", "offload_optimizer", "offload_param")
_TRAINING = (
    "dtype", "mixed_precision", "micro_batch_size", "seq_len", "grad_accum_steps", "optim", "packed", "attn",
    "gradient_checkpointing", "liger", "head", "vocab_size", "eval_batch_size", "quantization", "task", "device_map",
    "max_new_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a command has to say, and how it ends."""

    text: str
    code: int = 0


app = typer.Typer(
    help="Know before you launch: the memory that a training run will need.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from memplan import __version__

        typer.echo(f"memplan {__version__}")
        raise typer.Exit


@app.callback()
def _memplan(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _with_options(command: Callable[..., _Answer]) -> Callable[..., _Answer]:
    """Give a command the options of :data:`OPTIONS`, which it receives as keyword arguments."""
    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    shared = [
        inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(option))
        for option in OPTIONS
    ]
    command.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
    return command


def _annotation(option: Option) -> Any:
    switch = f"{option.flag}/--{option.off}" if option.off else option.flag
    if option.metavar:
        info = typer.Option(option.flag, metavar=option.metavar, help=option.help, rich_help_panel=option.panel)
        return Annotated[str | None, info]
    info = typer.Option(switch, help=option.help, rich_help_panel=option.panel, show_default=False)
    return Annotated[bool | None, info]


@app.command()
@_with_options
def estimate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder or a config.json.")],
    **options: Any,
) -> _Answer:
    """Estimate the memory of a training run, a loading or a generation, per GPU.

    Exit codes: 0 fits (or unknown, without a GPU), 1 does not fit, 2 bad input, 3 tight.
    """
    from memplan import api

    given = {name: value for name, value in options.items() if value is not None}
    training, cluster, strategy = _training(given), _cluster(given), _strategy(given)
    software = given.get("software")
    mode: dict[str, bool] = {
        "replay": not given.get("no_replay", False),
        "explain": given.get("explain", False),
        "trace": given.get("trace", False),
    }
    result: Estimate | EstimateList
    if strategy is None and training.task == "train":
        result = api.ladder(model, training, cluster, software=software, **mode)
    else:
        result = api.estimate(model, training, cluster, strategy, software=software, **mode)
    code = EXIT_CODES[result.verdict]
    if given.get("json"):
        return _Answer(result.to_json(indent=2, explain=mode["explain"]), code)
    return _Answer(_page(result, model, training, cluster, strategy, software), code)


@app.command()
def models(
    json: Annotated[bool, typer.Option("--json", help="The list as JSON.")] = False,
) -> _Answer:
    """List the models of the catalog."""
    from memplan.catalog.models import all_models

    rows = all_models()
    if json:
        from dataclasses import asdict

        return _Answer(_json({"schema_version": 1, "models": [asdict(row) for row in rows]}))
    from memplan.render import table

    return _Answer(table.models_text(rows))


@app.command()
def gpus(
    json: Annotated[bool, typer.Option("--json", help="The list as JSON.")] = False,
) -> _Answer:
    """List the GPUs of the catalog."""
    from memplan.catalog.gpus import all_gpus

    rows = all_gpus()
    if json:
        return _Answer(_json({"schema_version": 1, "gpus": [row.to_dict() for row in rows]}))
    from memplan.render import table

    return _Answer(table.gpus_text(rows))


@app.command()
def schema() -> _Answer:
    """Print the JSON schema of every input and every answer."""
    from pydantic.json_schema import models_json_schema

    from memplan import results, specs

    roots = [specs.TrainingSpec, specs.Strategy, specs.ClusterSpec, specs.ModelSpec, specs.SoftwareSpec]
    roots += [results.Estimate, results.EstimateList]
    _, definitions = models_json_schema([(root, "validation") for root in roots])
    return _Answer(_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **definitions}))


# -- from options to specs -------------------------------------------------------------------------------------------


def _training(given: Mapping[str, Any]) -> TrainingSpec:
    from memplan.errors import SpecError
    from memplan.specs.training import TrainingSpec

    fields = {name: _number(given[name]) for name in _TRAINING if name in given}
    lora = {name: given[f"lora_{name}"] for name in ("rank", "targets", "dropout") if f"lora_{name}" in given}
    if lora:
        if "rank" not in lora:
            name, value = next(iter(lora.items()))
            raise SpecError.at(f"lora_{name}", value, "has no adapters to apply to", "Give --lora-rank too.")
        fields["lora"] = {name: value if name == "targets" else _number(value) for name, value in lora.items()}
    return TrainingSpec(**fields)


def _cluster(given: Mapping[str, Any]) -> ClusterSpec:
    from memplan.specs.hardware import ClusterSpec
    from memplan.units import parse_gib

    fields = {name: _number(given[name]) for name in _CLUSTER if name in given}
    for name in ("gpu_memory", "host_memory", "nvme"):
        if name in given:
            fields[name] = parse_gib(given[name], name)
    for name in ("gpu", "nvme_path"):
        if name in given:
            fields[name] = given[name]
    return ClusterSpec(**fields)


def _strategy(given: Mapping[str, Any]) -> Strategy | None:
    from memplan.errors import UnsupportedError
    from memplan.specs.strategy import Strategy

    if "engine_config" in given:
        remedy = "Give its settings as options: --strategy, --offload-optimizer, --offload-param."
        raise UnsupportedError.at("engine_config", given["engine_config"], "cannot be read yet", remedy)
    fields = {("kind" if name == "strategy" else name): given[name] for name in _STRATEGY if name in given}
    return Strategy(**fields) if fields else None


def _number(value: Any) -> Any:
    """The number that a text writes, or the text, for the spec to refuse."""
    if not isinstance(value, str):
        return value
    if _INTEGER.fullmatch(value):
        return int(value)
    try:
        return float(value)
    except ValueError:
        return value


# -- answers ---------------------------------------------------------------------------------------------------------


def _page(
    result: Estimate | EstimateList,
    model: str,
    training: TrainingSpec,
    cluster: ClusterSpec,
    strategy: Strategy | None,
    software: str | None,
) -> str:
    """The answer as a page, with what to do next where it does not fit."""
    from memplan import api
    from memplan.render import table
    from memplan.results import EstimateList

    several = isinstance(result, EstimateList)
    first = result.estimates[0] if isinstance(result, EstimateList) else result
    setups = api.rungs(training, api.plain(training, cluster)) if several else (api.Setup(training, strategy),)
    options: Sequence[str] = ()
    gpus: Sequence[Sequence[str]] = ()
    if result.verdict in ("tight", "does-not-fit"):
        options = api.remedies(model, training, cluster, strategy, software=software)
    return ""


def _json(data: Any) -> str:
    import json

    return json.dumps(data, indent=2, allow_nan=False)
