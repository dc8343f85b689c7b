"""Results in words: the phrases that the table and the HTML page share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memplan.answers import Comparison, CountedModel, Finding, Plan, Point
from memplan.results import (
    Assumption,
    Estimate,
    StepTime,
    Verdict,
    verdict_by_place,
)
from memplan.space import LADDER, SIZES
from memplan.specs.strategy import ZeroSpec
from memplan.units import GiB, KiB, gib

__all__ = [
    "AS_ASKED",
    "PLAIN",
    "VERDICTS",
    "assumed",
    "batch_of",
    "compared_hardware",
    "components_of",
    "count",
    "counted",
    "extras",
    "findings_title",
    "gib",
    "gib_more",
    "gpu_name",
    "hardware",
    "interval",
    "is_of_images",
    "key_value",
    "model_facts",
    "next_steps",
    "point",
    "precision_facts",
    "rungs",
    "setup_facts",
    "sizes",
    "solved",
    "speed_in_a_row",
    "tokens",
    "verdict",
    "verdict_in_a_row",
]

VERDICTS: dict[Verdict, str] = {
    "fits": "fits",
    "tight": "tight",
    "does-not-fit": "does not fit",
    "unknown": "unknown",
}
"""Verdicts as people read them."""

AS_ASKED = LADDER[0][0]
"""The name of a plan's first rung."""
PLAIN = {"single": "plain training", "ddp": "DDP"}
"""Strategies that a plan starts with, as people say them."""

_PRECISION = {"no": "", "bf16": " + bf16 autocast", "fp16": " + fp16 autocast"}
_PLACES = {"host": ("--host-memory", "host memory"), "nvme": ("--nvme", "NVMe")}
_ROW_PLACES = {"host": "host", "nvme": "NVMe"}
_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def findings_title(findings: Sequence[Finding], where: str = " in the files") -> str:
    """How many there are of each severity, and where.

    >>> some = Finding(code="padding", severity="error", path="p", message="m", remedy="r")
    >>> findings_title([some, some])
    '2 errors in the files'
    """
    counts = {name: sum(finding.severity == name for finding in findings) for name in ("error", "warning", "info")}
    plural = {"error": "errors", "warning": "warnings", "info": "info"}
    parts = [f"{number} {name if number == 1 else plural[name]}" for name, number in counts.items() if number]
    return f"{', '.join(parts)}{where}"


def gib_more(size: int) -> str:
    """A difference of bytes in GiB, with its sign.

    >>> gib_more(-(2**30)), gib_more(0)
    ('-1.00', '0.00')
    """
    return f"{size / GiB:+,.2f}" if size else gib(0)


def key_value(value: int | bool | str) -> str:
    """A key's value as its file has it.

    >>> key_value(500000000), key_value(15099494), key_value(True), key_value("cpu")
    ('5e8', '15,099,494', 'true', 'cpu')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    digits = str(value).rstrip("0")
    zeros = len(str(value)) - len(digits)
    return f"{digits}e{zeros}" if zeros > 4 and len(digits) == 1 else f"{value:,}"


def interval(low: int, high: int) -> str:
    """A range of bytes in GiB.

    >>> interval(2**30, 2**31)
    '1.00 .. 2.00'
    """
    return gib(low) if gib(low) == gib(high) else f"{gib(low)} .. {gib(high)}"


def count(number: int) -> str:
    """A count of parameters, to three digits.

    >>> count(6_738_415_616), count(124_439_808), count(999_885_952), count(12)
    ('6.74 B', '124 M', '1.00 B', '12')
    """
    rounded = float(f"{number:.3g}")  # first, so that 999.9 M becomes 1.00 B
    for scale, letter in _SCALES:
        if rounded >= scale:
            value = rounded / scale
            return f"{value:.{3 - len(str(int(value)))}f} {letter}"
    return str(number)


def model_facts(estimate: Estimate) -> str:
    """The model's class, its size, and what of it is trained."""
    model = estimate.model
    parts = [model.architecture, f"{count(model.parameters)} parameters"]
    if _task(estimate) == "train":
        trainable = model.trainable_parameters
        parts.append("all trained" if trainable == model.parameters else f"{count(trainable)} trained")
    return ", ".join(parts)


def setup_facts(estimate: Estimate) -> str:
    """How the run is spread, and the shape of a batch."""
    task = _task(estimate)
    parts = [strategy(estimate) if task == "train" else task]
    if task != "load":
        parts.append(batch(estimate))
    if task == "generate":
        parts.append(f"{option(estimate, 'max_new_tokens') or 0} new tokens")
    if option(estimate, "device_map"):
        parts.append(f"device_map {option(estimate, 'device_map')}")
    if task == "train" and option(estimate, "gradient_checkpointing"):
        parts.append("checkpointing")
    if task == "train" and option(estimate, "lora_rank"):
        parts.append(f"LoRA rank {option(estimate, 'lora_rank')}")
    if option(estimate, "eval_batch_size"):
        parts.append(f"evaluation of {option(estimate, 'eval_batch_size')}")
    if option(estimate, "alloc_conf"):
        parts.append(str(option(estimate, "alloc_conf")))
    return ", ".join(parts)


def precision_facts(estimate: Estimate) -> str:
    """Types, kernels and the optimizer."""
    training = _task(estimate) == "train"
    dtype = str(option(estimate, "dtype"))
    mixed = _PRECISION.get(str(option(estimate, "mixed_precision")), "") if training else ""
    if mixed and str(option(estimate, "strategy")).startswith("zero"):  # no autocast: the engine casts the model
        mixed = " with float32 masters"
    quantization = option(estimate, "quantization")
    parts = [dtype + mixed, quantization if quantization != "none" else None, option(estimate, "attn")]
    if training:
        parts += [option(estimate, "optim"), "Liger" if option(estimate, "liger") else None]
    return ", ".join(str(part) for part in parts if part)


def _task(estimate: Estimate) -> str:
    return str(option(estimate, "task") or "train")


def batch(estimate: Estimate) -> str:
    """Sequences, their length, and the micro-batches that make a step."""
    steps = option(estimate, "grad_accum_steps") or 1
    accumulated = f" x {steps} micro-batches" if steps > 1 else ""
    sequences = option(estimate, "micro_batch_size")
    if is_of_images(estimate):
        return f"{sequences} images{accumulated}"
    return f"{sequences} x {option(estimate, 'seq_len')} tokens{accumulated}"


def is_of_images(estimate: Estimate) -> bool:
    """Whether what is trained on are images, whose tokens nobody counts."""
    return estimate.model.architecture.endswith("ForImageClassification")


def strategy(estimate: Estimate) -> str:
    """The engine, and what it offloads."""
    places = {
        word: option(estimate, name) for word, name in (("optim", "offload_optimizer"), ("param", "offload_param"))
    }
    away = {name: place for name, place in places.items() if place not in (None, "none")}
    if len(away) == 2 and len(set(away.values())) == 1:
        away = {"all": away["param"]}
    return ", ".join([str(option(estimate, "strategy")), *(f"{name} on {place}" for name, place in away.items())])


def rungs(estimates: Sequence[Estimate]) -> list[str]:
    """What tells the setups of a ladder apart; a batch that all have is left out."""
    batches = [_batch_of_rung(estimate) for estimate in estimates]
    if len(set(batches)) == 1 and len(batches) > 1:
        batches = [""] * len(batches)
    return [
        ", ".join(
            filter(None, (strategy(each), size, "checkpointing" if option(each, "gradient_checkpointing") else ""))
        )
        for each, size in zip(estimates, batches, strict=True)
    ]


def micro_batches(estimate: Estimate) -> str:
    """Sequences of a micro-batch x micro-batches of a step."""
    return f"{option(estimate, 'micro_batch_size')} x {option(estimate, 'grad_accum_steps') or 1}"


def speed_in_a_row(estimate: Estimate, *, by_tokens: bool) -> str:
    """Seconds of a step, or tokens in a second."""
    if estimate.step is None:
        return "-"
    return f"{estimate.step.tokens_per_second:,.0f}" if by_tokens else f"{estimate.step.seconds:.3g}"


def tokens(estimate: Estimate) -> str:
    """The sequence length."""
    return f"{option(estimate, 'seq_len'):,}"


_ASKED = {
    "micro-batch": ("largest micro-batch", "sequence", "sequences"),
    "seq-len": ("longest sequence", "token", "tokens"),
    "gpus": ("fewest GPUs", "GPU", "GPUs"),
    "gpu": ("smallest GPU", "", ""),
}


def solved(plan: Plan) -> str:
    """The answer to what was asked for, in a line."""
    found = plan.solved
    assert found is not None
    name, one, many = _ASKED[found.question]
    if found.value is None or plan.best is None:
        limit = f": {found.limit}" if found.limit else ""
        return f"No {name.split(maxsplit=1)[1] if found.question != 'gpus' else 'number of GPUs'} fits{limit}"
    value = found.value
    shown = value if isinstance(value, str) else f"{value:,} {one if value == 1 else many}"
    limit = f", {found.limit}" if found.limit else ""
    return f"The {name} that fit{'' if found.question == 'gpus' else 's'}: {shown} ({plan.best.name}){limit}"


def sizes(setup: Mapping[str, Any]) -> str:
    """The sizes of DeepSpeed's buffers that a plan has chosen, where they are not DeepSpeed's own."""
    found, own = setup.get("engine_config"), ZeroSpec()
    if not isinstance(found, Mapping) or not str(setup.get("strategy")).startswith("zero"):
        return ""
    keys = [name for name in SIZES[-1] if found.get(name) != getattr(own, name)]
    return ", ".join(f"{name} {key_value(found[name])}" for name in keys)


def point(each: Point) -> str:
    """A setup of the front: its rung, and whether its buffers are DeepSpeed's own."""
    return f"{each.name}, small buffers" if sizes(each.setup) else each.name


def batch_of(each: Point) -> str:
    """Sequences of a micro-batch x micro-batches of a step."""
    return f"{each.setup['micro_batch_size']} x {each.setup['grad_accum_steps']}"


def _batch_of_rung(estimate: Estimate) -> str:
    steps = option(estimate, "grad_accum_steps") or 1
    return f"batch {option(estimate, 'micro_batch_size')}" + (f" x {steps}" if steps > 1 else "")


def option(estimate: Estimate, name: str) -> Any:
    """The value of an option in the setup: ``lora_rank`` is there by that name, or the ``rank`` of ``lora``."""
    value = estimate.setup.get(name)
    if name not in estimate.setup and "_" in name:
        outer, _, inner = name.partition("_")
        nested = estimate.setup.get(outer)
        value = nested.get(inner) if isinstance(nested, Mapping) else None
    return value.get("kind") if isinstance(value, Mapping) else value


def gpu_name(estimate: Estimate) -> str | None:
    """The GPU's name, or None without one."""
    gpu = estimate.cluster.get("gpu")
    return gpu.get("name") if isinstance(gpu, Mapping) else gpu


def hardware(estimate: Estimate) -> str:
    """How many of which GPU, on how many nodes, and what each holds."""
    cluster, capacity = estimate.cluster, estimate.gpu.capacity
    gpus, nodes = cluster.get("gpus") or 1, cluster.get("nodes") or 1
    name = gpu_name(estimate) or "GPU of unknown size"
    across = f" on {nodes} nodes" if nodes > 1 else ""
    size = "" if capacity is None else f", {gib(capacity)} GiB{' each' if gpus > 1 else ''}"
    return f"{gpus} x {name}{across}{size}"


def compared_hardware(comparison: Comparison) -> str:
    """How many GPUs, on how many nodes."""
    gpus, nodes = comparison.gpus, comparison.nodes
    return f"{gpus} GPU{'s' if gpus > 1 else ''} on {nodes} node{'s' if nodes > 1 else ''}"


def counted(model: CountedModel) -> str:
    """What DeepSpeed's estimators count, in millions cut off as they print them."""
    millions, largest = model.parameters // 10**6, model.largest_layer_parameters // 10**6
    what = "AutoModel" if model.head == "base" else f"a {model.head} model"
    return f"counts {what}: {millions}M parameters, {largest}M in the largest layer"


def components_of(estimate: Estimate) -> list[tuple[str, int]]:
    """The components of ``peak_allocated`` that are there."""
    outside = ("fragmentation", "context", "nccl")
    return [(name, size) for name, size in estimate.gpu.components if size and name not in outside]


def verdict(estimate: Estimate) -> str:
    """The verdict, with the place that decides it and the numbers behind it."""
    gpu, host, nvme = estimate.gpu, estimate.host, estimate.nvme
    margins = {
        "gpu": _margin(gpu.low, gpu.high, gpu.capacity),
        "host": f"host memory, {_margin(host.peak, host.peak, host.capacity)}",
        "nvme": f"NVMe, {_margin(nvme.bytes, nvme.bytes, nvme.capacity)}",
    }
    place = _deciding(estimate)
    return VERDICTS[estimate.verdict] + (f": {margins[place]}" if place else "")


def verdict_in_a_row(estimate: Estimate) -> str:
    """The verdict in a word or two; the numbers beside it are the GPU's, so another place that decides it is named."""
    place = _deciding(estimate)
    return VERDICTS[estimate.verdict] + (f" ({_ROW_PLACES[place]})" if place in _ROW_PLACES else "")


def _deciding(estimate: Estimate) -> str | None:
    """The first place with the estimate's verdict; none where the verdict has another reason."""
    places = verdict_by_place(estimate.gpu, estimate.host, estimate.nvme)
    return next((place for place, found in places.items() if found == estimate.verdict), None)


def _margin(low: int, high: int, capacity: int | None) -> str:
    if capacity is None:
        return "the capacity is not known"
    if high <= capacity:
        return f"{gib(capacity - high)} GiB to spare" + (" at the upper end" if low < high else "")
    if low == high:
        return f"{gib(low - capacity)} GiB more than there is"
    if low <= capacity:
        return f"the upper end is {gib(high - capacity)} GiB more than there is"
    return f"even the lower end is {gib(low - capacity)} GiB more than there is"


def next_steps(estimate: Estimate, gpus: Sequence[str] = (), options: Sequence[str] = (), of: str = "") -> str:
    """What to do about a verdict, or nothing if the setup fits.

    ``gpus`` are names of GPUs that the setup fits on, or the setup that is named ``of``; ``options`` what may be added,
    each by itself, to make the run fit.
    """
    if estimate.verdict == "fits":
        return ""
    place = _deciding(estimate)
    if place in _PLACES:
        (option, name), used = _PLACES[place], estimate.host.peak if place == "host" else estimate.nvme.bytes
        if estimate.verdict == "unknown":
            return f"give its size with {option}"
        lacks = f"give each node {gib(used)} GiB of {name}"
    if estimate.verdict == "unknown" and gpu_name(estimate) is not None:
        return "give its size with --gpu-memory"
    if estimate.verdict == "unknown":
        return f"name yours with --gpu; it fits on {_listed(gpus)}" if gpus else "name a GPU with --gpu"
    steps = [f"add {option}" for option in options]
    if place in _PLACES:
        steps.append(lacks)
    if gpus and (of or place not in _PLACES):
        steps.append(f"use {_listed(gpus)}" + (f" for {of}" if of else ""))
    return ", or ".join(steps) or f"it needs a GPU of {gib(estimate.gpu.high)} GiB"


def extras(estimate: Estimate) -> list[tuple[str, str]]:
    """What only some tasks answer: step time, footprint, KV cache, device map."""
    lines = []
    if estimate.step is not None:
        step = estimate.step
        speed = f"{step.seconds:.3g} s, {_speed(estimate, step)}, bound by {step.bound_by}"
        lines.append(("step", speed))
    if estimate.footprint is not None:
        lines.append(("footprint", f"{gib(estimate.footprint)} GiB, as get_memory_footprint() counts"))
    if estimate.kv_cache is not None:
        lines.append(("kv cache", f"{gib(estimate.kv_cache)} GiB at the end"))
    if estimate.device_map is not None:
        lines.append(("device map", _device_map(estimate.device_map)))
    return lines


def _speed(estimate: Estimate, step: StepTime) -> str:
    if not is_of_images(estimate):
        return f"{step.tokens_per_second:,.0f} tokens/s"
    per_rank = option(estimate, "micro_batch_size") * (option(estimate, "grad_accum_steps") or 1)
    return f"{per_rank * (estimate.cluster.get('gpus') or 1) / step.seconds:,.3g} images/s"


def _device_map(device_map: Mapping[str, int | str]) -> str:
    """Modules per device: ``GPU 0: 12 modules``."""
    counts: dict[int | str, int] = {}
    for device in device_map.values():
        counts[device] = counts.get(device, 0) + 1
    places = ((f"GPU {device}" if isinstance(device, int) else device, number) for device, number in counts.items())
    return ", ".join(f"{place}: {number} module{'s' if number > 1 else ''}" for place, number in places)


def assumed(assumption: Assumption) -> tuple[str, str]:
    """An assumption's value with its range, and its source; bytes are shown in GiB."""
    # Assumption.of names the unit of everything but bytes.
    if assumption.low == assumption.high == assumption.value == 0:
        return "", assumption.source  # a statement without a number
    in_bytes = isinstance(assumption.value, int) and not assumption.name.endswith(")") and assumption.high >= KiB
    show = (lambda number: gib(int(number))) if in_bytes else "{:g}".format
    value, low, high = (show(number) for number in (assumption.value, assumption.low, assumption.high))
    span = "" if low == high else f" ({low} .. {high})"
    return f"{value}{' GiB' if in_bytes else ''}{span}", assumption.source


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
