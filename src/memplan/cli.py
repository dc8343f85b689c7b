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
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand

from memplan.errors import MemplanError, did_you_mean

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


class Option(NamedTuple):
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
    Option("engine_config", "FILE", "A DeepSpeed JSON or accelerate YAML; other options win over it.", _SPREAD),
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
    Option("seq_len", "S", "Tokens per sequence (default: 2048); no more than the model has positions for.", _RUN),
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
    Option(
        "use_reentrant",
        "",
        "Of gradient_checkpointing_kwargs (default: as transformers; off, before 5.0 on).",
        _RUN,
        off="no-use-reentrant",
    ),
    Option("liger", "", "Liger's fused loss (default: off).", _RUN, off="no-liger"),
    Option(
        "keeps_outputs",
        "",
        "A loop of one's own holds the logits while the loss goes backward (default: off, as the Trainer).",
        _RUN,
        off="no-keeps-outputs",
    ),
    Option(
        "head",
        "HEAD",
        "What stands on the model: causal-lm, seq2seq-lm, masked-lm, sequence-classification, image-classification or "
        "base (default: what the config's architecture says).",
        _RUN,
    ),
    Option("vocab_size", "V", "Resize the embeddings to this (default: the config's).", _RUN),
    Option("eval_batch_size", "E", "Sequences per GPU in evaluation (default: no evaluation).", _RUN),
    Option(
        "eval_accumulation_steps",
        "K",
        "Batches of logits that evaluation keeps on the GPU, with compute_metrics (default: losses only).",
        _RUN,
    ),
    Option("alloc_conf", "NAME:VALUE,...", "PYTORCH_ALLOC_CONF, as in expandable_segments:True.", _RUN),
    Option("peft_type", "lora", "PEFT's method; the others are refused by name.", _ADAPTERS),
    Option("lora_rank", "R", "Train LoRA adapters of this rank.", _ADAPTERS),
    Option("lora_targets", "NAMES", "Modules with adapters, as in q_proj,v_proj (default: PEFT's mapping).", _ADAPTERS),
    Option("lora_dropout", "P", "Dropout of the adapters (default: 0).", _ADAPTERS),
    Option("quantization", "none|int8|nf4|nf4-dq", "Quantize the frozen weights (default: none).", _ADAPTERS),
    Option("task", "train|load|generate", "What the run does (default: train).", _TASK),
    Option("device_map", "auto|balanced|balanced_low_0|sequential", "How loading spreads layers over devices.", _TASK),
    Option("max_new_tokens", "T", "Tokens to generate after a prompt of the sequence length.", _TASK),
    Option("software", "NAME=VERSION,...", "Library versions, as in transformers=5.23,torch=2.13.", _ANSWER),
    Option("trace", "", "Trace the real model; needs the train extra.", _ANSWER),
    Option("no_replay", "", "Skip the caching allocator: an upper bound on reserved memory, sooner.", _ANSWER),
    Option("explain", "", "Every term: formula, numbers, source.", _ANSWER),
    Option("json", "", "The answer as JSON.", _ANSWER),
)
"""The options of the commands that estimate, in the order of their help."""

_OPTION_NAMES = frozenset(option.name for option in OPTIONS)
_PATHS = {option.name: option.flag for option in OPTIONS} | {
    "kind": "--strategy",
    "packed": "--packed/--padded",
    "lora.rank": "--lora-rank",
    "lora.targets": "--lora-targets",
    "lora.dropout": "--lora-dropout",
    "quantization.kind": "--quantization",
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            *("global_batch_size", "target", "objective", "solve", "allow", "out", "html", "cap", "boundary", "steps"),
            *("record", "runs", "diff", "save", "lengths"),
        )
    },
}
"""A field's path, as an error names it -> the option that sets it."""

_INTEGER = re.compile(r"[+-]?\d{1,40}")
_NUMBERS = frozenset(option.name for option in OPTIONS if len(option.metavar) == 1) | {"global_batch_size"}
_LORA = ("rank", "targets", "dropout")
_CLUSTER = ("gpu", "gpus", "nodes", "gpu_memory", "host_memory", "nvme", "nvme_path")
_STRATEGY = ("strategy", "offload_optimizer", "offload_param")
_ONE_ESTIMATE = ("trace", "explain", "no_replay", *_STRATEGY, "engine_config")
"""What a plan and a check of files decide themselves, or have no answer to."""
_TRAINING = (
    "dtype", "mixed_precision", "micro_batch_size", "seq_len", "grad_accum_steps", "optim", "packed", "attn",
    "gradient_checkpointing", "use_reentrant", "liger", "keeps_outputs", "head", "vocab_size",
    "eval_batch_size", "eval_accumulation_steps", "alloc_conf", "peft_type", "quantization", "task", "device_map",
    "max_new_tokens",
)  # fmt: skip


_LENGTHS = "Tokens of the dataset's texts: a .txt, .csv, .json, .npy or .parquet. The longest batch is estimated."


class _Answer(NamedTuple):
    """What a command has to say, and how it ends."""

    text: str
    code: int = 0


class _Command(TyperCommand):
    """A command whose help has its options under headings, in plain text: names stay whole at 80 columns."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _typer() -> typer.Typer:
    return typer.Typer(
        rich_markup_mode=None,
        help="Know before you launch: the memory that a training run will need.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )


app = _typer()


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
    taken = [*own, *_shared()]
    command.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    return command


@cache
def _shared() -> tuple[inspect.Parameter, ...]:
    """The options, as parameters."""
    return tuple(
        inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(option))
        for option in OPTIONS
    )


def _annotation(option: Option) -> Any:
    switch = f"{option.flag}/--{option.off}" if option.off else option.flag
    if option.metavar:
        info = typer.Option(option.flag, metavar=option.metavar, help=option.help, rich_help_panel=option.panel)
        return Annotated[str | None, info]
    info = typer.Option(switch, help=option.help, rich_help_panel=option.panel, show_default=False)
    return Annotated[bool | None, info]


@app.command(cls=_Command)
@_with_options
def estimate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder or a config.json.")],
    lengths: Annotated[str | None, typer.Option(metavar="FILE", help=_LENGTHS)] = None,
    **options: Any,
) -> _Answer:
    """Estimate the memory that a run needs on each GPU.

    Exit codes: 0 fits (or unknown, without a GPU), 1 does not fit, 2 bad input, 3 tight.
    """
    from memplan import api, parallel

    given = {name: value for name, value in options.items() if value is not None}
    training, cluster, strategy = _training(given), _cluster(given), _strategy(given)
    if lengths is not None:
        from memplan.lengths import read_lengths

        # As a Trainer's collator has them: cut at --seq-len if it is given, and padded to the longest of a batch.
        longest = read_lengths(lengths).padded(training.seq_len if "seq_len" in given else None).longest
        padded = {} if "packed" in given else {"packed": False}
        training = training.replace(**({"seq_len": max(longest, 1)} if not given.get("packed") else {}), **padded)
    software = given.get("software")
    mode: dict[str, Any] = {
        "replay": not given.get("no_replay", False),
        "explain": given.get("explain", False),
        "trace": given.get("trace", False),
    }
    config = given.get("engine_config")
    result: Estimate | EstimateList
    if strategy is None and config is None and training.task == "train":
        result = api.ladder(model, training, cluster, software=software, processes=min(parallel.cores(), 4), **mode)
    else:
        result = api.estimate(model, training, cluster, strategy, engine_config=config, software=software, **mode)
    code = EXIT_CODES[result.verdict]
    if given.get("json"):
        return _Answer(result.to_json(indent=2, explain=mode["explain"]), code)
    from memplan.advice import Advice, advise
    from memplan.render import table
    from memplan.results import EstimateList

    # Advice estimates dozens of setups: too many to trace.
    traced = mode["trace"]
    advice = Advice()
    if not traced:
        advice = advise(result, model, training, cluster, strategy, engine_config=config, software=software)
    if isinstance(result, EstimateList):
        return _Answer(table.estimates_text(result, gpus=advice.gpus, options=advice.options), code)
    gpus = next(iter(advice.gpus), ())
    return _Answer(table.estimate_text(result, gpus=gpus, options=advice.options), code)


@app.command(cls=_Command)
@_with_options
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder or a config.json.")],
    global_batch_size: Annotated[
        str | None, typer.Option(metavar="G", help="Sequences of one step, over all ranks; it stays as it is.")
    ] = None,
    target: Annotated[
        str, typer.Option(metavar="deepspeed|fsdp|auto", help="Whose rungs the ladder has.")
    ] = "deepspeed",
    objective: Annotated[
        str,
        typer.Option(
            metavar="throughput|memory|gpus", help="What is best: the least time, the least memory, or the fewest GPUs."
        ),
    ] = "throughput",
    solve: Annotated[
        str | None,
        typer.Option(
            metavar="micro-batch|seq-len|gpus|gpu",
            help="Ask for the largest, the longest, the fewest or the smallest with which a setup fits.",
        ),
    ] = None,
    allow: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="What else may be chosen, of liger,flash_attention_2,adamw_8bit,lora,qlora (default: none).",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write the files that run the best: bash DIR/launch.sh")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are in DIR already.")] = False,
    **options: Any,
) -> _Answer:
    """Look for the fastest setup that fits: on the ladder, and beside it.

    Exit codes: 0 a rung fits, 1 none is known to, 2 bad input, 3 only one that is tight.
    """
    from memplan import parallel, planning
    from memplan.render.progress import Bar

    given = {name: value for name, value in options.items() if value is not None}
    _only_estimated(given, _ONE_ESTIMATE)
    if global_batch_size is not None:
        given["global_batch_size"] = global_batch_size
    wishes: dict[str, Any] = {"target": target, "objective": objective, "solve": solve}
    wishes |= {"allow": [name.strip() for name in allow.split(",")] if allow else (), "software": given.get("software")}
    if global_batch_size is not None:
        wishes["global_batch_size"] = _value(given, "global_batch_size")
    if out is not None:
        from memplan.configs.launch import check_folder

        check_folder(out, force=force)  # before anything is computed
    with Bar("searching") as bar:
        wishes |= {"processes": min(parallel.cores(), 4), "done": bar}
        result = planning.plan(model, _training(given), _cluster(given), **wishes)
    if out is not None and result.best is not None:
        result = result.write(out, force=force)
    code = 1 if result.verdict == "unknown" else EXIT_CODES[result.verdict]  # nothing that is known to fit
    if given.get("json"):
        return _Answer(result.to_json(indent=2), code)
    from memplan.render import table

    return _Answer(table.plan_text(result, folder=out), code)


@app.command(cls=_Command)
@_with_options
def report(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder or a config.json.")],
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Where to write the page.")] = None,
    global_batch_size: Annotated[
        str | None, typer.Option(metavar="G", help="Sequences of one step, over all ranks; it stays as it is.")
    ] = None,
    target: Annotated[
        str, typer.Option(metavar="deepspeed|fsdp|auto", help="Whose rungs the ladder has.")
    ] = "deepspeed",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    **options: Any,
) -> _Answer:
    """Write one page with the estimate, the ladder, the timeline and the Pareto front: HTML that stands alone.

    Exit codes are those of memplan estimate; without a strategy the estimate is that of the plan's best.
    """
    from memplan import parallel
    from memplan.errors import SpecError
    from memplan.render.page import check_path
    from memplan.render.progress import Bar
    from memplan.reporting import report as answer

    given = {name: value for name, value in options.items() if value is not None}
    _only_estimated(given, ("trace", "explain", "no_replay"))
    if html is None and not given.get("json"):
        raise SpecError.at("html", None, "is not given, and a page is a file", "Name it, as in --html report.html.")
    if html is not None:
        check_path(html, force=force)  # before anything is computed
    wishes: dict[str, Any] = {"engine_config": given.get("engine_config"), "software": given.get("software")}
    wishes |= {"target": target, "processes": min(parallel.cores(), 4)}
    if global_batch_size is not None:
        wishes["global_batch_size"] = _value({"global_batch_size": global_batch_size}, "global_batch_size")
    specs = (model, _training(given), _cluster(given), _strategy(given))
    with Bar("searching") as bar:
        result = answer(*specs, done=bar, **wishes)
    if html is not None:
        result.write(html, force=force)
    code = EXIT_CODES[result.estimate.verdict]
    return _Answer(result.to_json(indent=2) if given.get("json") else f"written: {html}", code)


@app.command(cls=_Command)
@_with_options
def check(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A DeepSpeed JSON, an accelerate YAML, TrainingArguments, a LLaMA-Factory YAML, a script that starts "
            "a run, or a plan's folder.",
        ),
    ],
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="A hub id, a folder or a config.json.")] = None,
    lengths: Annotated[str | None, typer.Option(metavar="FILE", help=_LENGTHS)] = None,
    **options: Any,
) -> _Answer:
    """Say what the files of a run need, whether it fits, and what is wrong with them.

    Exit codes: 0 fits (or unknown, without a GPU), 1 does not fit or a finding is an error, 2 bad input, 3 tight.
    """
    from memplan import checks

    given = {name: value for name, value in options.items() if value is not None}
    _only_estimated(given, _ONE_ESTIMATE)
    specs = (_training(given), _cluster(given))
    result = checks.check(path, model, *specs, software=given.get("software"), lengths=lengths)
    code = 1 if result.has_errors else EXIT_CODES[result.verdict]
    if given.get("json"):
        return _Answer(result.to_json(indent=2), code)
    from memplan.render import table

    return _Answer(table.check_text(result), code)


@app.command(cls=_Command)
@_with_options
def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder or a config.json.")],
    **options: Any,
) -> _Answer:
    """Compare what DeepSpeed's and accelerate's estimators say with memplan.

    Exit codes: 0 compared, 2 bad input.
    """
    from memplan import api

    given = {name: value for name, value in options.items() if value is not None}
    _only_estimated(given, ("trace", "explain"))
    result = api.compare(
        model,
        _training(given),
        _cluster(given),
        _strategy(given),
        engine_config=given.get("engine_config"),
        software=given.get("software"),
        replay=not given.get("no_replay", False),
    )
    if given.get("json"):
        return _Answer(result.to_json(indent=2))
    from memplan.render import table

    return _Answer(table.comparison_text(result))


@app.command(cls=_Command)
@_with_options
def measure(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder or a config.json.")],
    cap: Annotated[str | None, typer.Option(metavar="GIB", help="Be a GPU of this size.")] = None,
    boundary: Annotated[
        str | None,
        typer.Option(metavar="micro-batch|seq-len", help="Search the largest that runs, beside the largest that fits."),
    ] = None,
    steps: Annotated[str, typer.Option(metavar="N", help="Optimizer steps.")] = "3",
    save: Annotated[bool, typer.Option("--save", help="Write a checkpoint at the end.")] = False,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Load weights by from_pretrained.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="List blocks at the peak that only one side has.")] = False,
    **options: Any,
) -> _Answer:
    """Run real steps on this machine's GPU, and compare what they take with the estimate.

    Exit codes: 0 it ran, 1 it died, 2 bad input, or no GPU.
    """
    from memplan import measuring
    from memplan.errors import SpecError
    from memplan.units import parse_gib

    given = {name: value for name, value in options.items() if value is not None}
    _only_estimated(given, ("trace", "explain", "no_replay"))
    if boundary is not None and boundary not in measuring.BOUNDARIES:
        raise SpecError.at("boundary", boundary, "is not known", f"Use {' or '.join(measuring.BOUNDARIES)}.")
    wishes: dict[str, Any] = {
        "engine_config": given.get("engine_config"),
        "software": given.get("software"),
        "cap": None if cap is None else parse_gib(cap, "cap"),
        "steps": int(steps) if _INTEGER.fullmatch(steps) else steps,
        "pretrained": pretrained,
    }
    for name, value in (("diff", diff), ("save", save)):
        if boundary is not None and value:
            raise SpecError.at(name, value, "is of one run, and not of a search", "Leave one of the two out.")
    specs = (model, _training(given), _cluster(given), _strategy(given))
    from memplan.render import measured as render

    if boundary is not None:
        found = measuring.measure_boundary(*specs, boundary=boundary, **wishes)
        return _Answer(found.to_json(indent=2) if given.get("json") else render.boundary_text(found))
    result = measuring.measure(*specs, save=save, snapshot=diff, **wishes)
    code = 0 if result.measurement.status == "ok" else 1
    return _Answer(result.to_json(indent=2) if given.get("json") else render.measured_text(result), code)


@app.command(cls=_Command)
def calibrate(
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Write the profile here.")] = None,
    record: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="A memplan-memory.json of a run here; may be repeated.")
    ] = None,
    runs: Annotated[str, typer.Option(metavar="N", help="Processes that look at the GPU.")] = "3",
    json: Annotated[bool, typer.Option("--json", help="The profile as JSON.")] = False,
) -> _Answer:
    """Measure this machine's own constants, which later estimates for its GPU use.

    Exit codes: 0 the profile is written, 2 bad input, or no GPU.
    """
    from pathlib import Path

    from memplan.errors import SpecError
    from memplan.introspect.calibrate import calibrate as measure_constants

    if _INTEGER.fullmatch(runs) is None or int(runs) < 1:
        raise SpecError.at("runs", runs, "is no number of processes", "Use a whole number from 1 on.")
    profile, path = measure_constants(
        None if out is None else Path(out), [Path(each) for each in record or ()], int(runs)
    )
    if json:
        return _Answer(profile.to_json(indent=2))
    from memplan.render.measured import profile_text

    return _Answer(profile_text(profile, path))


@app.command(cls=_Command)
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


@app.command(cls=_Command)
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


@app.command(cls=_Command)
def schema() -> _Answer:
    """Print the JSON schema of every input and every answer."""
    from pydantic.json_schema import models_json_schema

    from memplan import answers, results, specs
    from memplan.introspect import calibrate, measurement

    inputs = (specs.ModelSpec, specs.TrainingSpec, specs.ClusterSpec, specs.Strategy, specs.SoftwareSpec)
    outputs = (
        *(results.Estimate, results.EstimateList, answers.Plan, answers.Check, answers.Comparison, answers.Report),
        *(measurement.Measured, measurement.Boundary, calibrate.Profile),
    )
    _, definitions = models_json_schema([(root, "validation") for root in (*inputs, *outputs)])
    return _Answer(_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **definitions}))


# -- from options to specs -------------------------------------------------------------------------------------------


def _training(given: Mapping[str, Any]) -> TrainingSpec:
    from memplan.errors import SpecError
    from memplan.specs.training import TrainingSpec

    fields = {name: _value(given, name) for name in _TRAINING if name in given}
    lora = {name: _value(given, f"lora_{name}") for name in _LORA if f"lora_{name}" in given}
    if lora:
        if "rank" not in lora:
            name, value = next(iter(lora.items()))
            raise SpecError.at(f"lora_{name}", value, "has no adapters to apply to", "Give --lora-rank too.")
        fields["lora"] = lora
    return TrainingSpec(**fields)


def _cluster(given: Mapping[str, Any]) -> ClusterSpec:
    from memplan.specs.hardware import ClusterSpec
    from memplan.units import parse_gib

    fields = {name: _value(given, name) for name in _CLUSTER if name in given}
    for name in ("gpu_memory", "host_memory", "nvme"):
        if name in fields:
            fields[name] = parse_gib(fields[name], name)
    return ClusterSpec(**fields)


def _only_estimated(given: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse what only `memplan estimate` has an answer to."""
    from memplan.errors import SpecError

    for name in names:
        if given.get(name):
            remedy = f"Leave it out, or use memplan estimate {_PATHS[name]}."
            raise SpecError.at(name, given[name], "is for one estimate", remedy)


def _strategy(given: Mapping[str, Any]) -> Strategy | Mapping[str, Any] | None:
    from memplan.specs.strategy import Strategy

    fields = {("kind" if name == "strategy" else name): given[name] for name in _STRATEGY if name in given}
    if "engine_config" in given:
        return fields  # the file may have the rest
    return Strategy(**fields) if fields else None


def _value(given: Mapping[str, Any], name: str) -> Any:
    """An option's value; where a number is meant but not written, the text, for the spec to refuse."""
    value = given[name]
    if name not in _NUMBERS:
        return value
    if _INTEGER.fullmatch(value):
        return int(value)
    try:
        return float(value)
    except ValueError:
        return value


# -- answers ---------------------------------------------------------------------------------------------------------


def _json(data: Any) -> str:
    import json

    return json.dumps(data, indent=2, allow_nan=False)


# -- from the command line to the exit code --------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Answers go to stdout; an error is one message on stderr."""
    if arguments is None:
        arguments = sys.argv[1:]
        _hurry()
    try:
        return _run(arguments or ["--help"])
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED


def _hurry() -> None:
    """Spare a process that answers once and ends what only pays in a long one."""
    gc.disable()
    # To look for plugins, pydantic reads the metadata of everything installed.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


def _needed(arguments: Sequence[str]) -> typer.Typer:
    """The program with the command that is asked for alone, if there is one: each takes some milliseconds to set up."""
    name, *words = arguments
    narrow = _typer()
    narrow.registered_callback = app.registered_callback
    for info in app.registered_commands:
        if info.callback is not None and info.callback.__name__ == name:
            narrow.command(cls=info.cls)(_with_given(info.callback, words))
            return narrow
    return app


def _with_given(command: Callable[..., _Answer], words: Iterable[str]) -> Callable[..., _Answer]:
    """The command without those of :data:`OPTIONS` that are not given; as it is where a word may be another's."""
    flags = {word.partition("=")[0] for word in words if word.startswith("-")}
    given = {option.name for option in OPTIONS if option.flag in flags or f"--{option.off}" in flags}
    if not flags <= {flag for option in OPTIONS for flag in (option.flag, f"--{option.off}")}:
        return command
    whole = inspect.signature(command, eval_str=True)
    taken = [each for name, each in whole.parameters.items() if name in given or name not in _OPTION_NAMES]

    @wraps(command)
    def narrow(**values: Any) -> _Answer:
        return command(**values)

    narrow.__signature__ = whole.replace(parameters=taken)  # type: ignore[attr-defined]
    narrow.__annotations__ = {each.name: each.annotation for each in taken}
    return narrow


def _run(arguments: Sequence[str]) -> int:
    try:
        answer = _needed(arguments)(list(arguments), prog_name="memplan", standalone_mode=False)
    except MemplanError as error:
        return _failed(_in_options(str(error)), BAD_INPUT)
    except _UsageError as error:
        message = _usage(error)
        for word in arguments:  # which the parser repeats when it refuses them
            message = message.replace(word, f"{word[:100]}...") if len(word) > 100 else message
        return _failed(message, BAD_INPUT)
    except Exception as error:
        if os.environ.get("MEMPLAN_DEBUG"):
            raise
        about = f"{type(error).__name__}: {error}".strip()
        remedy = "Please report it; with MEMPLAN_DEBUG=1 set, memplan shows where it happened."
        return _failed(f"memplan: {about}. This is a bug in memplan. {remedy}", INTERNAL)
    if isinstance(answer, _Answer):
        return _write(answer.text) or answer.code
    return int(answer or 0)  # --help and --version have written already


# click is a part of some typers and a package for others, so its errors are found by way of typer.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def _usage(error: Any) -> str:
    """What the parser refused, in the words of :class:`SpecError`."""
    context, option = error.ctx, getattr(error, "option_name", None)
    help_page = f"See {context.command_path} --help." if context else "See memplan --help."
    if hasattr(error, "possibilities"):
        known = [flag for each in context.command.params for flag in (*each.opts, *each.secondary_opts)]
        flags = [flag for flag in known if flag.startswith("-")]
        return f"{option}: is not an option of {context.command_path}. {did_you_mean(str(option), flags)}"
    if option is not None:
        return f"{option}: has no value, or one where it takes none. {help_page}"
    parameter = getattr(error, "param", None)
    if parameter is not None:
        return f"{parameter.metavar or parameter.name}: missing. {parameter.help or ''} {help_page}"
    message = error.format_message()
    return message if message.endswith("?") else f"{message.rstrip('.')}. {help_page}"


def _in_options(message: str) -> str:
    """Name the option where an error names its field; several wrong ones are one message."""
    return " ".join(_in_option(line) for line in message.split("\n"))


def _in_option(line: str) -> str:
    path, colon, rest = line.partition(":")
    option, dot, setting = path.partition(".")
    if path not in _PATHS and option in _PATHS and dot:
        return f"{_PATHS[option]} {setting}{colon}{rest}"
    return f"{_PATHS.get(path, path)}{colon}{rest}"


def _failed(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _write(text: str) -> int:
    """Write an answer, and return 0 or the exit code of what went wrong."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return READER_GONE
        return _failed(f"stdout: cannot be written ({error.strerror}). Write the answer elsewhere.", BAD_INPUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
