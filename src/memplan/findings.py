"""What is wrong with the files of a run, beside memory: one small function per mistake.

A finding is raised only where the installed libraries really behave so, which ``tests/test_findings.py`` shows by
running them, or where memplan's own estimate says so. ``docs/checks.md`` has a heading per code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from memplan.answers import Finding
from memplan.architectures.nn import checkpoints_calls
from memplan.configs.argument_keys import DEFAULTS
from memplan.configs.arguments import argument, switched_on
from memplan.configs.command import visible_gpus
from memplan.configs.run import Run
from memplan.configs.section import quoted
from memplan.engines.zero3 import attributes_recomputed
from memplan.errors import MemplanError
from memplan.estimator import resolve
from memplan.lengths import Batches
from memplan.results import (
    Estimate,
    verdict_by_place,
)
from memplan.sharded import play_ranks
from memplan.specs.hardware import ClusterSpec, GPUSpec
from memplan.specs.model import ModelSpec
from memplan.specs.software import SoftwareSpec
from memplan.specs.strategy import Strategy
from memplan.specs.training import TrainingSpec
from memplan.units import gib

__all__ = ["CHECKS", "Checked", "data_parallel_of", "find", "memory_finding", "quantized_full", "sorted_by_severity"]

_SEVERITY = ("error", "warning", "info")


@dataclass(frozen=True, slots=True)
class Checked:
    """A run, as its files say it and as it is merged."""

    run: Run
    training: TrainingSpec
    strategy: Strategy
    cluster: ClusterSpec
    model: ModelSpec
    software: SoftwareSpec
    estimate: Estimate
    batches: Batches | None = None
    """Of the dataset's texts, where their lengths are known."""
    counted: bool = True
    """Whether anything says how many GPUs there are; else ``cluster`` has what was taken."""

    @property
    def deepspeed(self) -> Mapping[str, Any]:
        """The DeepSpeed config as it is written; empty without one."""
        values = self.run.raw.get("deepspeed")
        return {} if values is None else values.data

    @property
    def arguments(self) -> Mapping[str, Any]:
        """TrainingArguments as they are written; empty without them."""
        values = self.run.raw.get("arguments")
        return {} if values is None else values.data

    @property
    def of_a_trainer(self) -> bool:
        """Whether transformers or accelerate are known to drive the engine."""
        return bool(self.arguments) or "accelerate" in self.run.raw or _has_auto(self.deepspeed)

    def path(self, kind: str, key: str) -> str:
        """A key of a file, as messages name it."""
        values = self.run.raw.get(kind)
        return f"{self.run.source if values is None else values.source}: {key}"

    @property
    def gpu(self) -> GPUSpec | None:
        """The GPU, where it is known."""
        return self.cluster.gpu if isinstance(self.cluster.gpu, GPUSpec) else None


def find(checked: Checked) -> list[Finding]:
    """Return every finding, in the order of :data:`CHECKS`."""
    return [found for check in CHECKS if (found := check(checked)) is not None]


def sorted_by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings; of equals what was found first."""
    return tuple(sorted(findings, key=lambda found: _SEVERITY.index(found.severity)))


# -- what does not start, or does something else than is asked for -----------------------------------------------------

_MATCHED = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
}
"""Keys that HfTrainerDeepSpeedConfig compares with an argument."""
_PRECISIONS: tuple[Literal["fp16", "bf16"], ...] = ("fp16", "bf16")


def trainer_mismatch(checked: Checked) -> Finding | None:
    """``trainer_config_process`` notes what differs, and ``trainer_config_finalize`` raises ValueError for it."""
    arguments = checked.arguments
    kind, data = ("deepspeed", checked.deepspeed) if checked.deepspeed else ("accelerate", _of_plugin(checked))
    if not data or not arguments:
        return None
    wanted: dict[str, tuple[str, object]] = {key: (name, argument(arguments, name)) for key, name in _MATCHED.items()}
    parts = [argument(arguments, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    total = data.get("train_batch_size")
    if all(isinstance(part, int) for part in parts):
        each = parts[0] * parts[1]
        if checked.counted:
            product = checked.cluster.gpus * each
            wanted["train_batch_size"] = (f"{checked.cluster.gpus} GPUs x batch x accumulation", product)
        elif isinstance(total, int) and each > 0 and total % each:  # which is no number of GPUs, whatever there are
            wanted["train_batch_size"] = ("batch x accumulation, of which it is no multiple,", each)
    betas = [argument(arguments, name) for name in ("adam_beta1", "adam_beta2")]
    wanted["optimizer.params.betas"] = ("adam_beta1 and adam_beta2", betas)
    for precision in _PRECISIONS:
        on = switched_on(arguments, precision) or bool(arguments.get(f"{precision}_full_eval"))
        wanted[f"{precision}.enabled"] = (precision, on)
    total_steps = arguments.get("max_steps")  # without it how many there are is known by the dataset alone
    total_steps = total_steps if isinstance(total_steps, int) and total_steps > 0 else None
    if total_steps is not None:
        wanted["scheduler.params.total_num_steps"] = ("max_steps", total_steps)
    warmup = _warmup(argument(arguments, "warmup_steps"), total_steps)
    if warmup is not None and "warmup_ratio" not in arguments:
        wanted["scheduler.params.warmup_num_steps"] = ("warmup_steps", max(1, warmup))
    found = [
        (key, value, name, theirs)
        for key, (name, theirs) in wanted.items()
        if (value := _at(data, key)) not in (None, "auto") and not _equal(value, theirs)
    ]
    if not found:
        return None
    said = "; ".join(
        f"{key} is {_shown(value)}, but {name}{' of the arguments' if name == key else ''} is {_shown(theirs)}"
        f"{', its default' if name in DEFAULTS and name not in arguments else ''}"
        for key, value, name, theirs in found
    )
    return Finding(
        code="trainer-mismatch",
        severity="error",
        path=checked.path(kind, found[0][0] if kind == "deepspeed" else _IN_PLUGIN.get(found[0][0], found[0][0])),
        message=f"The Trainer refuses values that are not those of its arguments: {said}.",
        remedy='Write "auto" in the DeepSpeed config, so that each is said once.'
        if kind == "deepspeed"
        else "Leave it out of the accelerate config, or give the Trainer the same.",
    )


def _warmup(steps: object, total: int | None) -> int | None:
    """``TrainingArguments.get_warmup_steps``: below 1 it is a share of all steps; None if those are not known."""
    if isinstance(steps, bool) or not isinstance(steps, (int, float)) or not 0 <= steps < math.inf:
        return None
    if steps >= 1 or steps == 0:
        return int(steps)
    return None if total is None else math.ceil(total * steps)


_IN_PLUGIN = {
    "gradient_accumulation_steps": "deepspeed_config.gradient_accumulation_steps",
    "gradient_clipping": "deepspeed_config.gradient_clipping",
    "bf16.enabled": "mixed_precision",
    "fp16.enabled": "mixed_precision",
}


def _of_plugin(checked: Checked) -> dict[str, Any]:
    """What DeepSpeedPlugin makes of accelerate's own keys, as far as the Trainer compares it.

    A precision that the Trainer is asked for goes before the launcher's (``TrainingArguments.mixed_precision``).
    """
    values = checked.run.raw.get("accelerate")
    section = None if values is None else values.data.get("deepspeed_config")
    if values is None or not isinstance(section, Mapping):
        return {}
    data: dict[str, Any] = {name: section.get(name) for name in ("gradient_accumulation_steps", "gradient_clipping")}
    launched = str(values.data.get("mixed_precision")).lower()
    if launched in _PRECISIONS and not any(switched_on(checked.arguments, each) for each in _PRECISIONS):
        data[launched] = {"enabled": True}
    return data


def scheduler_total_steps(checked: Checked) -> Finding | None:
    """``WarmupDecayLR`` has no default for ``total_num_steps``, and the Trainer fills in what is ``auto`` only."""
    scheduler = checked.deepspeed.get("scheduler")
    if not isinstance(scheduler, Mapping) or scheduler.get("type") not in ("WarmupDecayLR", "WarmupCosineLR"):
        return None
    params = scheduler.get("params")
    if isinstance(params, Mapping) and params.get("total_num_steps") is not None:
        return None
    return Finding(
        code="scheduler-total-steps",
        severity="error",
        path=checked.path("deepspeed", "scheduler.params.total_num_steps"),
        message=f"It is missing, and {scheduler['type']} cannot be made without it.",
        remedy='Add "total_num_steps": "auto" for the Trainer, or the number of steps; or leave the section out.',
    )


def scheduler_warmup_steps(checked: Checked) -> Finding | None:
    """DeepSpeed refuses warm-ups of no steps since 0.19.6."""
    steps = _at(checked.deepspeed, "scheduler.params.warmup_num_steps")
    kind = _at(checked.deepspeed, "scheduler.type")
    if kind not in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR") or not checked.software.at_least(
        "deepspeed", "0.19.6"
    ):
        return None
    if not isinstance(steps, (int, float)) or isinstance(steps, bool) or (isinstance(steps, int) and steps > 0):
        return None
    return Finding(
        code="scheduler-warmup-steps",
        severity="error",
        path=checked.path("deepspeed", "scheduler.params.warmup_num_steps"),
        message=f"{quoted(steps)} is refused by DeepSpeed since 0.19.6, which wants a positive whole number.",
        remedy='Write 1 for no warm-up, or "auto" for the Trainer.',
    )


_REPLACED_BY_ADAM = frozenset(
    {
        *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "sgd", "rmsprop", "lion_8bit", "paged_lion_8bit"),
    }
)


def optimizer_replaced(checked: Checked) -> Finding | None:
    """accelerate's ``map_pytorch_optim_to_deepspeed`` makes DeepSpeedCPUAdam of what has no counterpart there."""
    if not _offloads_a_clients_optimizer(checked) or checked.training.optim not in _REPLACED_BY_ADAM:
        return None
    return Finding(
        code="optimizer-replaced",
        severity="warning",
        path=checked.path("arguments", "optim"),
        message=f"{checked.training.optim!r} is not what trains: as it is offloaded, accelerate puts DeepSpeed's CPU "
        "Adam in its place.",
        # bitsandbytes' would then step on the CPU, which is not modelled.
        remedy="Use adamw_torch."
        if "8bit" in checked.training.optim
        else 'Use adamw_torch, or set "zero_force_ds_cpu_optimizer": false in the DeepSpeed config.',
    )


def _offloads_a_clients_optimizer(checked: Checked) -> bool:
    strategy = checked.strategy
    offloads = strategy.is_deepspeed and strategy.offload_optimizer != "none"
    forced = strategy.zero.zero_force_ds_cpu_optimizer and not strategy.zero.ds_optimizer
    return offloads and forced and checked.of_a_trainer


def device_map(checked: Checked) -> Finding | None:
    """``from_pretrained`` refuses a device_map under ZeRO-3, ``Accelerator.prepare`` one over several devices."""
    value = checked.arguments.get("device_map")
    if value not in ("auto", "balanced", "balanced_low_0", "sequential"):
        return None
    if checked.strategy.kind == "zero3":
        message = f"{value!r} is refused by from_pretrained under ZeRO-3, which shards the weights itself."
    elif checked.cluster.gpus > 1:
        message = f"{value!r} spreads one model over the GPUs, which accelerate refuses to train in a distributed run."
    else:
        return None
    return Finding(
        code="device-map",
        severity="error",
        path=checked.path("arguments", "device_map"),
        message=message,
        remedy="Leave it out: every rank puts the model on its own GPU.",
    )


def data_parallel(checked: Checked) -> Finding | None:
    """``Trainer._wrap_model`` takes nn.DataParallel where it has several GPUs, and no engine."""
    count = visible_gpus(checked.run.environment)
    several = checked.run.launcher == "python" and count is not None and count > 1
    if not several or not checked.arguments or checked.strategy.kind != "single" or checked.cluster.gpus > 1:
        return None
    if checked.arguments.get("device_map") or checked.arguments.get("load_in_8bit"):  # which are no DataParallel's
        return None
    return data_parallel_of(count or 0)


def data_parallel_of(count: int) -> Finding:
    """What is to be said of a process that has several GPUs to itself."""
    return Finding(
        code="data-parallel",
        severity="warning",
        path="launcher",
        message=f"{count} GPUs are visible and no launcher has started ranks: the Trainer takes nn.DataParallel, whose "
        "first GPU holds more than the others. What one GPU needs by itself was estimated.",
        remedy="Start the script by torchrun or accelerate launch, or leave one GPU by CUDA_VISIBLE_DEVICES.",
    )


def quantized_full(run: Run, training: TrainingSpec) -> Finding | None:
    """``validate_quantization_for_training``: without adapters there is nothing to train."""
    if run.arguments is None or "quantization" not in run.arguments.training or training.lora is not None:
        return None
    if "lora" in run.arguments.training:
        return None
    values = run.raw["arguments"]
    names = ("quantization", "load_in_4bit", "load_in_8bit", "q_lora", "use_4bit_quantization", "use_8bit_quantization")
    name = next((name for name in names if values.data.get(name)), names[0])
    return Finding(
        code="quantized-full",
        severity="error",
        path=f"{values.source}: {name}",
        message="The Trainer refuses to train a quantized model that has no adapters.",
        remedy="Add LoRA (use_peft: true, or --lora-rank), or leave the quantization out.",
    )


# -- what costs something ----------------------------------------------------------------------------------------------


def offload_param_ignored(checked: Checked) -> Finding | None:
    """Only the optimizer of stage 3 is made with ``offload_param``."""
    stage = checked.strategy.zero_stage
    if stage is None or stage == 3:
        return None
    path, device = checked.path("deepspeed", "zero_optimization.offload_param"), ""
    section = _at(checked.deepspeed, "zero_optimization.offload_param")
    if isinstance(section, Mapping):
        device = str(section.get("device", "none"))
    accelerate = checked.run.raw.get("accelerate")
    if accelerate is not None and not checked.deepspeed:
        device = str(_at(accelerate.data, "deepspeed_config.offload_param_device") or "none").lower()
        path = checked.path("accelerate", "deepspeed_config.offload_param_device")
    if device not in ("cpu", "nvme"):
        return None
    return Finding(
        code="offload-param-ignored",
        severity="warning",
        path=path,
        message=f"{device!r} has no effect at stage {stage}: the weights stay on the GPU.",
        remedy="Use stage 3, or leave it out.",
    )


def no_weights_saved(checked: Checked) -> Finding | None:
    """``Accelerator.get_state_dict`` raises, and ``Trainer.save_model`` then saves the engine's shards in its place."""
    zero = checked.strategy.zero
    if checked.strategy.kind != "zero3" or zero.stage3_gather_16bit_weights_on_model_save or not checked.of_a_trainer:
        return None
    of_plugin = "accelerate" in checked.run.raw and not checked.deepspeed
    path = checked.path("deepspeed", "zero_optimization.stage3_gather_16bit_weights_on_model_save")
    if of_plugin:
        path = checked.path("accelerate", "deepspeed_config.zero3_save_16bit_model")
    return Finding(
        code="no-weights-saved",
        severity="warning",
        path=path,
        message="It is off: what the Trainer saves holds no weights, only DeepSpeed's shards.",
        remedy="Set it to true, or make weights of the shards by zero_to_fp32.py, which is saved beside them.",
    )


def frozen_weights_held(checked: Checked) -> Finding | None:
    """``update_recompute_parameters`` of DeepSpeed makes what a recomputation fetches the property of the module whose
    backward runs. That is the whole model where hooks of blocks run again with them (GradientCheckpointingLayer).
    """
    training, software = checked.training, checked.software
    if checked.strategy.kind != "zero3" or training.lora is None or not training.gradient_checkpointing:
        return None
    if not (training.reentrant(software) and checkpoints_calls(software) and attributes_recomputed(software)):
        return None
    return Finding(
        code="frozen-weights-held",
        severity="warning",
        path=checked.path("arguments", "gradient_checkpointing_kwargs"),
        message=f"With transformers {software.transformers}, DeepSpeed {software.deepspeed} and reentrant checkpoints "
        "every frozen weight that the backward gathers stays gathered until it is over, on each GPU.",
        remedy='Set it to {"use_reentrant": false}.',
    )


def bf16_emulated(checked: Checked) -> Finding | None:
    """``torch.cuda.is_bf16_supported`` counts emulation, so that nothing stops the run."""
    gpu, setup = checked.gpu, checked.estimate.setup
    if gpu is None or gpu.supports_bf16 or gpu.is_cpu:
        return None
    mixed = setup.get("mixed_precision")
    # DeepSpeed and FSDP make fp16's type, or float32, of what is loaded.
    are_weights = setup.get("dtype") == "bfloat16" and (mixed == "no" or checked.strategy.kind in ("single", "ddp"))
    if mixed != "bf16" and not are_weights:
        return None
    whose = "" if mixed == "bf16" else ", in which the weights are loaded"
    load = "load the weights in float32"
    return Finding(
        code="bf16-emulated",
        severity="warning",
        path=_of_precision(checked, "bf16"),
        message=f"{gpu.name} has no units for bfloat16{whose}: torch runs it all the same, emulated and several times "
        "slower.",
        remedy=f"{load.capitalize()}." if whose else f"Use fp16, and {load}." if are_weights else "Use fp16.",
    )


def bf16_in_fp16(checked: Checked) -> Finding | None:
    """bfloat16 reaches to 3.4e38, float16 to 65504."""
    config = checked.model.config
    stored = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if checked.estimate.setup.get("mixed_precision") != "fp16" or stored != "bfloat16":
        return None
    return Finding(
        code="bf16-in-fp16",
        severity="warning",
        path=_of_precision(checked, "fp16"),
        message="The checkpoint is in bfloat16: values above 65504 become infinite in float16, and the loss NaN.",
        remedy="Use bf16 where the GPU has it; otherwise watch for steps that are skipped by overflow.",
    )


def _of_precision(checked: Checked, name: str) -> str:
    """Where a 16-bit type is asked for: the arguments go before the launcher's config, and weights come last."""
    arguments = checked.arguments
    if arguments.get(name):
        return checked.path("arguments", name)
    if name in checked.deepspeed:
        return checked.path("deepspeed", name)
    launched = checked.run.raw.get("accelerate")
    if launched is not None and str(launched.data.get("mixed_precision")).lower() == name:
        return checked.path("accelerate", "mixed_precision")
    loaded = {"bf16": "bfloat16", "fp16": "float16"}[name]
    for key in ("dtype", "torch_dtype", "bnb_4bit_quant_storage_dtype"):
        if str(arguments.get(key)).removeprefix("torch.") == loaded:
            return checked.path("arguments", key)
    return checked.path("arguments", "dtype") if arguments else checked.run.source


_SMALLER = 50_000_000
_NOTICED = 20
"""A bucket is worth a word from a twentieth of the GPU on."""


def default_buckets(checked: Checked) -> Finding | None:
    """The engine is played again with a bucket of a tenth: what the default takes of a GPU that is too small."""
    strategy, capacity = checked.strategy, checked.estimate.gpu.capacity
    if not strategy.is_deepspeed or strategy.kind == "zero0" or capacity is None:
        return None
    if checked.estimate.verdict == "fits":
        return None
    if strategy.zero.reduce_bucket_size != 10 * _SMALLER:
        return None
    smaller = strategy.replace(zero=strategy.zero.replace(reduce_bucket_size=_SMALLER))
    try:
        peaks = [
            play_ranks(
                resolve(checked.model, checked.training, checked.cluster, each, checked.software),
                checked.gpu,
                each,
                checked.cluster.gpus,
                checked.cluster.gpus_per_node,
            ).peak
            for each in (strategy, smaller)
        ]
    except MemplanError:
        return None
    saved = peaks[0] - peaks[1]
    if saved * _NOTICED < capacity:
        return None
    return Finding(
        code="default-buckets",
        severity="warning",
        path=checked.path("deepspeed", "zero_optimization.reduce_bucket_size"),
        message=f"5e8 elements, DeepSpeed's default, take {gib(saved)} GiB of {gib(capacity)} more than 5e7 would.",
        remedy='Set reduce_bucket_size to 5e7, or to "auto" for the Trainer.',
    )


def fsdp_wraps_nothing(checked: Checked) -> Finding | None:
    """Without a policy accelerate makes one unit of the whole model, which is gathered at once."""
    if checked.strategy.kind != "fsdp" or checked.strategy.fsdp.auto_wrap_policy != "NO_WRAP":
        return None
    return Finding(
        code="fsdp-wraps-nothing",
        severity="warning",
        path=checked.path("accelerate" if "accelerate" in checked.run.raw else "arguments", "fsdp_auto_wrap_policy"),
        message="The whole model is one unit: all weights are gathered on every GPU at once.",
        remedy="Set fsdp_auto_wrap_policy to TRANSFORMER_BASED_WRAP.",
    )


def host_memory(checked: Checked) -> Finding | None:
    """What the estimate says of the host."""
    host = checked.estimate.host
    if host.capacity is None or host.peak <= host.capacity:
        return None
    phase = max(host.phases, key=lambda each: each.allocated).name if host.phases else "load"
    steady = (
        f"; training takes {gib(host.steady)}" if phase in ("load", "save") and host.steady <= host.capacity else ""
    )
    return Finding(
        code="host-memory",
        severity="error",
        path=checked.run.source,
        message=f"A node's {host.ranks} ranks need {gib(host.peak)} GiB of {gib(host.capacity)} in phase {phase}"
        f"{steady}. Linux kills a process that runs out of it without a message.",
        remedy="Use fewer ranks on a node, less offloading, or more RAM.",
    )


def save_needs_more(checked: Checked) -> Finding | None:
    """A run that dies at its first checkpoint has trained for hours."""
    gpu = checked.estimate.gpu
    found = {phase.name: phase.allocated for phase in gpu.phases}
    rest = max((size for name, size in found.items() if name != "save"), default=0)
    if gpu.capacity is None or found.get("save", 0) <= rest:
        return None
    others = gpu.low - found["save"]
    if gpu.low <= gpu.capacity or rest + others > gpu.capacity:
        return None
    return Finding(
        code="save-needs-more",
        severity="error",
        path=checked.run.source,
        message=f"Saving takes {gib(found['save'])} GiB, training {gib(rest)}: the run dies at its first checkpoint.",
        remedy="Save shards (FSDP: SHARDED_STATE_DICT), or the weights without gathering them.",
    )


# -- what is good to know ----------------------------------------------------------------------------------------------


def padding(checked: Checked) -> Finding | None:
    """Collators pad to the longest text of a batch."""
    is_of_text = "vocab_size" in checked.model.config
    if checked.training.packed or not is_of_text or not checked.arguments or checked.batches is not None:
        return None
    return Finding(
        code="padding",
        severity="info",
        path=checked.path("arguments", "packing"),
        message=f"Texts are padded to the longest of their batch: the peak is of the longest batch, here of "
        f"{checked.training.seq_len} tokens, however rare it is.",
        remedy="Cut texts at a length that fits, or pack them.",
    )


def longest_batch(checked: Checked) -> Finding | None:
    """What the lengths of a dataset's texts come to: all of an epoch is drawn, so the longest will be there."""
    batches = checked.batches
    if batches is None:
        return None
    given, padded, limit = batches.given, batches.padded, batches.limit
    if limit is None or padded.longest <= limit:
        cut = "" if given.longest <= padded.longest else f", of {given.longest:,} before they are cut"
        return Finding(
            code="longest-batch",
            severity="info",
            path=batches.source,
            message=f"The longest of {given.texts:,} texts makes a batch of {padded.longest:,} tokens in length{cut}, "
            f"which is what was estimated; the median text has {given.median():,}.",
            remedy="Cut texts shorter, or pack them, to need less.",
        )
    micro, ranks, accumulated = (
        checked.training.micro_batch_size,
        checked.cluster.gpus,
        checked.training.grad_accum_steps,
    )
    if not limit:
        return Finding(
            code="longest-batch",
            severity="warning",
            path=batches.source,
            message=f"Not even the shortest of {given.texts:,} texts fits for certain in batches of {micro}.",
            remedy="Take a smaller micro-batch, or see memplan plan for what would fit.",
        )
    said = (
        f"{padded.beyond(limit):,} of {given.texts:,} texts are longer than the {limit:,} tokens that fit for certain"
    )
    if batches.order is None:
        said += "; how soon one is drawn is not modelled for this train_sampling_strategy"
    else:
        steps = None if batches.max_steps is None else batches.max_steps * accumulated
        risk = padded.risk(
            limit, micro, ranks, steps=steps, order=batches.order, drop_last=batches.drop_last,
            limit_of_last=batches.limit_of_last,
        )  # fmt: skip
        within = "an epoch" if steps is None else f"{batches.max_steps:,} steps"
        said += f": within {within} a batch has one with a probability of {_percent(risk)}"
        half = padded.step_by_which(limit, micro, ranks, order=batches.order)
        if half is not None:
            said += f", by step {-(-half // accumulated):,} with one of 50%"
    return Finding(
        code="longest-batch",
        severity="warning",
        path=batches.source,
        message=f"{said}.",
        remedy=f"Cut texts at {limit:,} tokens, pack them, or take a smaller micro-batch.",
    )


def _percent(share: float) -> str:
    """A probability, in which neither certainty nor impossibility is made of what is neither."""
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return "less than 0.1%" if share < 0.001 else "more than 99.9%" if share > 0.999 else f"{share:.1%}"


_RTX_40 = re.compile(r"(?:GeForce )?RTX ?40\d0")


def geforce_p2p(checked: Checked) -> Finding | None:
    """``check_cuda_p2p_ib_support`` of accelerate, which ``accelerate launch`` heeds itself."""
    gpu = checked.gpu
    if gpu is None or not _RTX_40.match(gpu.name) or checked.cluster.gpus_per_node < 2:
        return None
    disabled = {"NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"} <= checked.run.environment.keys()
    if disabled or checked.run.launcher == "accelerate" or "accelerate" in checked.run.raw:
        return None
    return Finding(
        code="geforce-p2p",
        severity="info",
        path=checked.run.source,
        message=f"{gpu.name} has no peer-to-peer: with a driver before 550.40.07 accelerate refuses to start several.",
        remedy="Set NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1, or start by accelerate launch, which does.",
    )


CHECKS: tuple[Callable[[Checked], Finding | None], ...] = (
    trainer_mismatch,
    scheduler_total_steps,
    scheduler_warmup_steps,
    optimizer_replaced,
    device_map,
    data_parallel,
    host_memory,
    save_needs_more,
    offload_param_ignored,
    no_weights_saved,
    frozen_weights_held,
    bf16_emulated,
    bf16_in_fp16,
    default_buckets,
    fsdp_wraps_nothing,
    padding,
    longest_batch,
    geforce_p2p,
)
"""The checks of a run; what reading it finds comes before."""


def _at(data: Mapping[str, Any], path: str) -> Any:
    """The value at a path; None where a section is missing or is none."""
    value: Any = data
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _equal(value: object, other: object) -> bool:
    try:
        if isinstance(other, list) and isinstance(value, (list, tuple)):
            return [float(each) for each in value] == [float(each) for each in other]
        if isinstance(other, (int, float)) and not isinstance(value, (list, tuple, Mapping)):
            return float(value) == float(other)  # type: ignore[arg-type]  # a TypeError is no number
    except (TypeError, ValueError, OverflowError):  # an integer beyond all floats is none of them
        return False
    return value == other


def _shown(value: object) -> str:
    return value if isinstance(value, str) else quoted(value)


def _has_auto(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_auto, value.values()))
    return isinstance(value, str) and value == "auto"


def memory_finding(estimate: Estimate, remedies: Sequence[str] = ()) -> Finding | None:
    """Return what is to be said of a run's memory: nothing if it fits; ``remedies`` are setups that do."""
    gpu, host, nvme = estimate.gpu, estimate.host, estimate.nvme
    verdict = estimate.verdict
    if verdict == "fits":
        return None
    place = next((place for place, found in verdict_by_place(gpu, host, nvme).items() if found == verdict), "gpu")
    low, high = {"host": (host.peak,) * 2, "nvme": (nvme.bytes,) * 2}.get(place, (gpu.low, gpu.high))
    capacity = {"host": host.capacity, "nvme": nvme.capacity}.get(place, gpu.capacity)
    where = {"host": "host memory of a node", "nvme": "NVMe of a node"}.get(place, "memory of each GPU")
    needed = gib(low) if gib(low) == gib(high) else f"{gib(low)} to {gib(high)}"
    phase = f", most of it in phase {gpu.peak_phase}" if place == "gpu" else ""
    if verdict == "unknown" or capacity is None:
        message = f"The run needs {needed} GiB of the {where}{phase}, and how much there is is not known."
        return Finding(
            code="memory-unknown", severity="info", path="memory", message=message, remedy="Say it by cluster=."
        )
    message = f"The run needs {needed} GiB of the {where}{phase}, and there are {gib(capacity)} GiB."
    remedy = f"What fits: {'; '.join(remedies)}." if remedies else "See memplan plan for what would fit."
    if verdict == "tight":
        return Finding(code="tight", severity="warning", path="memory", message=message, remedy=remedy)
    return Finding(code="does-not-fit", severity="error", path="memory", message=message, remedy=remedy)
