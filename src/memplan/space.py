"""What a plan may choose: the ladder, the engines beside it, the sizes of DeepSpeed's buffers, micro-batches.

The space has one setup for each engine (:func:`families`), with and without gradient checkpointing, each with every
micro-batch that divides a rank's batch and each of :data:`SIZES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import Any, Literal, NamedTuple, TypeAlias

from memplan.results import Assumption
from memplan.specs.strategy import Kind, Offload, OffloadParamSpec, Strategy, ZeroSpec
from memplan.specs.training import LoraSpec, QuantizationSpec, TrainingSpec

__all__ = [
    "FSDP_LADDER",
    "LADDER",
    "SIDES",
    "SIZES",
    "Change",
    "Family",
    "Setup",
    "Target",
    "changed",
    "checkpointed",
    "divisors",
    "families",
    "in_nf4",
    "levels",
    "micro_batch_1",
    "rungs",
    "sequences",
    "simplicity",
    "sized",
    "with_8bit_adam",
    "with_flash_attention",
    "with_liger",
    "with_lora",
    "with_micro_batch",
]

Target: TypeAlias = Literal["deepspeed", "fsdp", "auto"]


@dataclass(frozen=True, slots=True)
class Setup:
    """What the ladder may change, and on how many GPUs; model, hardware and software stay as they are."""

    training: TrainingSpec
    strategy: Strategy
    gpus: int = 1
    is_gpu_known: bool = True
    nvme_buffer_size: int | None = None
    """Elements of the largest partition of a weight, which a buffer must hold if weights are offloaded to NVMe; None
    where there is no NVMe."""
    lora_targets: tuple[str, ...] = ()
    """What adapters are named for, if they are chosen; none where PEFT has a default for the model."""
    notes: tuple[Assumption, ...] = ()
    """Where an option has won over a config, and what else the config's engine does."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, of specs the fields that were given."""
        return {
            "training": self.training.model_dump(mode="json", exclude_unset=True),
            "strategy": self.strategy.model_dump(mode="json", exclude_unset=True),
            "gpus": self.gpus,
            "is_gpu_known": self.is_gpu_known,
            "nvme_buffer_size": self.nvme_buffer_size,
            "lora_targets": list(self.lora_targets),
            "notes": [note.model_dump(mode="json") for note in self.notes],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Setup:
        """Build from :meth:`to_dict`."""
        specs = {"training": TrainingSpec(**data["training"]), "strategy": Strategy(**data["strategy"])}
        notes = tuple(Assumption(**note) for note in data["notes"])
        return cls(**{**data, **specs, "lora_targets": tuple(data["lora_targets"]), "notes": notes})


Change: TypeAlias = Callable[[Setup], "Setup | None"]
"""A setup that needs less memory, or None where the change does not apply."""


def changed(setup: Setup, **fields: Any) -> Setup:
    """The setup with other fields of its TrainingSpec."""
    return replace(setup, training=setup.training.replace(**fields))


# -- the ladder ------------------------------------------------------------------------------------------------------


def _as_asked(setup: Setup) -> Setup:
    return setup


def micro_batch_1(setup: Setup) -> Setup | None:
    """The same global batch, one sequence at a time."""
    if setup.training.task != "train" or setup.training.micro_batch_size == 1:
        return None
    return with_micro_batch(setup, 1)


def eval_batch_1(setup: Setup) -> Setup | None:
    """Evaluation one sequence at a time, whose metrics stay the same."""
    if setup.training.task != "train" or setup.training.eval_batch_size in (None, 1):
        return None
    return changed(setup, eval_batch_size=1)


def checkpointed(setup: Setup) -> Setup | None:
    """Checkpointing on, unless it was switched on or off by hand."""
    if setup.training.task != "train" or "gradient_checkpointing" in setup.training.model_fields_set:
        return None
    return changed(setup, gradient_checkpointing=True)


def _under(kind: Kind, offload_optimizer: Offload = "none", offload_param: Offload = "none") -> Change:
    """The change to an engine that shards. One GPU has nobody to share with, and may offload if it is too small."""
    offloads = (offload_optimizer, offload_param)

    def change(setup: Setup) -> Setup | None:
        if setup.training.task != "train":
            return None
        if setup.gpus == 1 and (offload_optimizer == "none" or not setup.is_gpu_known):
            return None
        if "nvme" in offloads and setup.nvme_buffer_size is None:
            return None
        strategy = Strategy(kind=kind, offload_optimizer=offload_optimizer, offload_param=offload_param)
        return replace(setup, strategy=strategy)

    return change


def _all_on_nvme(setup: Setup) -> Setup | None:
    """With keys under which host memory holds little: buffers that all weights fit into, and none in their place."""
    less = _under("zero3", "nvme", "nvme")(setup)
    if less is None or setup.nvme_buffer_size is None:
        return None
    param = OffloadParamSpec(max_in_cpu=0, buffer_size=max(setup.nvme_buffer_size, OffloadParamSpec().buffer_size))
    # Weights that stay gathered keep a buffer each, of which there are five; prefetching can ask for one twice.
    unkept = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    zero = ZeroSpec(offload_param=param, sub_group_size=100_000_000, **unkept)
    return replace(less, strategy=less.strategy.replace(zero=zero))


LADDER: tuple[tuple[str, Change], ...] = (
    ("as asked", _as_asked),
    ("micro-batch 1", micro_batch_1),
    ("gradient checkpointing", checkpointed),
    ("ZeRO-1", _under("zero1")),
    ("ZeRO-2", _under("zero2")),
    ("ZeRO-2, optimizer offloaded", _under("zero2", "cpu")),
    ("ZeRO-3", _under("zero3")),
    ("ZeRO-3, parameters offloaded", _under("zero3", "none", "cpu")),
    ("ZeRO-3, all offloaded", _under("zero3", "cpu", "cpu")),
    ("ZeRO-3, optimizer on NVMe", _under("zero3", "nvme", "cpu")),
    ("ZeRO-3, all on NVMe", _all_on_nvme),
)
"""The rungs, each a change to the one before it; the faster comes first."""


FSDP_LADDER: tuple[tuple[str, Change], ...] = (
    *LADDER[:3],
    ("FSDP", _under("fsdp")),
    ("FSDP, parameters offloaded", _under("fsdp", "none", "cpu")),
)
"""The rungs for who would rather have FSDP."""


def rungs(setup: Setup) -> tuple[Setup, ...]:
    """Return the setups of the ladder that apply to a run, from ``setup`` on."""
    return tuple(rung for _, rung in _climbed(setup, LADDER))


def _climbed(setup: Setup, ladder: Iterable[tuple[str, Change]]) -> Iterator[tuple[str, Setup]]:
    for name, change in ladder:
        less = change(setup)
        if less is not None:
            yield name, less
            setup = less


# -- beyond the ladder -----------------------------------------------------------------------------------------------

BESIDE: tuple[tuple[str, Change], ...] = (
    ("ZeRO-1, optimizer offloaded", _under("zero1", "cpu")),
    ("ZeRO-3, optimizer offloaded", _under("zero3", "cpu")),
    ("ZeRO-3, only the optimizer on NVMe", _under("zero3", "nvme")),
)
"""Engines that the ladder passes by: where they fit, one of its rungs mostly does too, and gives less up."""


def _without_resharding(setup: Setup) -> Setup | None:
    less = _under("fsdp")(setup)
    if less is None:
        return None
    return replace(less, strategy=less.strategy.replace(fsdp=less.strategy.fsdp.replace(reshard_after_forward=False)))


FSDP_BESIDE: tuple[tuple[str, Change], ...] = (("FSDP, gathered until the backward", _without_resharding),)
"""The same of FSDP: ``reshard_after_forward`` off."""


class Family(NamedTuple):
    """Setups that differ in the micro-batch and the sizes of buffers."""

    name: str
    setup: Setup
    """The one with the smallest micro-batch, and DeepSpeed's own sizes."""
    told: Literal["always", "faster", "chosen"] = "always"
    """When a plan tells of it: a rung of the ladder always, without checkpointing if that is faster."""

    @property
    def setups(self) -> int:
        """How many there are."""
        return len(levels(self.setup)) * len(self.micro_batches())

    def micro_batches(self) -> list[int]:
        """Those of the same global batch, from that of ``setup`` on, the smallest first."""
        smallest = self.setup.training.micro_batch_size
        return [size for size in divisors(sequences(self.setup)) if size >= smallest]


def families(asked: Setup, target: Target, allow: Sequence[str] = ()) -> list[Family]:
    """Return all of the space: the rungs in order, each without checkpointing too, then the engines beside them.

    Then all of them again with each choice of the ``SIDES`` that ``allow`` names.
    """
    found = [Family(name, setup) for name, setup in _of_target(asked, target)]
    checkpoints = not asked.training.gradient_checkpointing and any(
        each.setup.training.gradient_checkpointing for each in found
    )
    if checkpoints:
        found = [
            variant
            for each in found
            for variant in (
                (each, Family(f"{each.name}, without checkpointing", _unchecked(each.setup), "faster"))
                if each.setup.training.gradient_checkpointing
                else (each,)
            )
        ]
    least = checkpointed(asked) or asked
    least = micro_batch_1(least) or least
    beside = (*(BESIDE if target != "fsdp" else ()), *(FSDP_BESIDE if target != "deepspeed" else ()))
    for name, change in beside:
        setup = change(least)
        if setup is not None:
            found.append(Family(name, setup, "chosen"))
            if checkpoints:
                found.append(Family(f"{name}, without checkpointing", _unchecked(setup), "chosen"))
    chosen = [names for size in range(1, len(allow) + 1) for names in combinations(allow, size)]
    with_sides = [_with_sides(each, names) for names in chosen for each in found]
    first: dict[Setup, Family] = {}
    for each in (*found, *filter(None, with_sides)):
        first.setdefault(each.setup, each)
    return list(first.values())


def with_liger(setup: Setup) -> Setup | None:
    """Liger's fused loss."""
    return changed(setup, liger=True) if setup.training.task == "train" else None


def with_8bit_adam(setup: Setup) -> Setup | None:
    """bitsandbytes' AdamW in place of torch's."""
    if setup.training.task != "train" or not setup.training.optim.startswith("adamw_torch"):
        return None
    return changed(setup, optim="adamw_8bit")


def with_flash_attention(setup: Setup) -> Setup | None:
    """The flash-attn package in place of what the model has."""
    return changed(setup, attn="flash_attention_2") if setup.training.task == "train" else None


def with_lora(setup: Setup) -> Setup | None:
    """Adapters of rank 16 are trained, and no other weights."""
    if setup.training.task != "train" or setup.training.lora is not None:
        return None
    return changed(setup, lora=LoraSpec(rank=16, targets=setup.lora_targets))


def in_nf4(setup: Setup) -> Setup | None:
    """Frozen weights in 4 bits."""
    if setup.training.task == "train" and setup.training.lora is None:
        return None
    return changed(setup, quantization=QuantizationSpec(kind="nf4"))


def _with_qlora(setup: Setup) -> Setup | None:
    adapted = with_lora(setup) or setup
    return in_nf4(adapted)


SIDES: Mapping[str, Change] = {
    "liger": with_liger,
    "flash_attention_2": with_flash_attention,
    "adamw_8bit": with_8bit_adam,
    "lora": with_lora,
    "qlora": _with_qlora,
}
"""What needs a further package, or changes what is trained: taken on request only."""


def _with_sides(family: Family, names: Sequence[str]) -> Family | None:
    setup = family.setup
    for name in names:
        less = SIDES[name](setup)
        if less is None or less == setup:
            return None
        setup = less
    return Family(f"{family.name}, {', '.join(names)}", setup, "chosen")


def _of_target(asked: Setup, target: Target) -> Iterator[tuple[str, Setup]]:
    yield from _climbed(asked, FSDP_LADDER if target == "fsdp" else LADDER)
    if target == "auto":
        for name, setup in _climbed(asked, FSDP_LADDER):
            if setup.strategy.kind == "fsdp":
                yield name, setup


def _unchecked(setup: Setup) -> Setup:
    # The rest is as the ladder has it: one sequence at a time.
    return changed(setup, gradient_checkpointing=False)


_KINDS: tuple[Kind, ...] = ("single", "ddp", "zero0", "zero1", "zero2", "fsdp", "zero3")


def simplicity(setup: Setup) -> tuple[int, ...]:
    """What a setup gives up: the smaller is taken of two that are as fast.

    What is trained and what needs a package, then disks, the host and stages.
    """
    strategy = setup.strategy
    places = (strategy.offload_optimizer, strategy.offload_param)
    training = setup.training
    return (
        (training.lora is not None) + (training.quantization is not None),
        training.liger + (training.optim == "adamw_8bit") + (training.attn == "flash_attention_2"),
        places.count("nvme"),
        places.count("cpu"),
        _KINDS.index(strategy.kind),
        int(setup.training.gradient_checkpointing),
        setup.training.micro_batch_size,
    )


# -- micro-batches and sizes -----------------------------------------------------------------------------------------


def sequences(setup: Setup) -> int:
    """That a rank trains on in one step."""
    return setup.training.micro_batch_size * setup.training.grad_accum_steps


def with_micro_batch(setup: Setup, size: int) -> Setup:
    """The same sequences of a step, ``size`` at a time, which divides them."""
    return changed(setup, micro_batch_size=size, grad_accum_steps=sequences(setup) // size)


def divisors(number: int) -> list[int]:
    """All of them, the smallest first.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


_STAGE_1_AND_2 = ("reduce_bucket_size", "allgather_bucket_size")
_STAGE_3 = (
    "reduce_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
SIZES: tuple[Mapping[str, int], ...] = (
    {},
    {"reduce_bucket_size": 100_000_000, "allgather_bucket_size": 100_000_000, "sub_group_size": 200_000_000},
    {
        "reduce_bucket_size": 25_000_000,
        "allgather_bucket_size": 25_000_000,
        "sub_group_size": 100_000_000,
        "stage3_prefetch_bucket_size": 25_000_000,
        "stage3_max_live_parameters": 200_000_000,
        "stage3_max_reuse_distance": 200_000_000,
    },
    {
        "reduce_bucket_size": 5_000_000,
        "allgather_bucket_size": 5_000_000,
        "sub_group_size": 20_000_000,
        "stage3_prefetch_bucket_size": 5_000_000,
        "stage3_param_persistence_threshold": 10_000,
        "stage3_max_live_parameters": 10_000_000,
        "stage3_max_reuse_distance": 10_000_000,
    },
)
"""DeepSpeed's own sizes (the defaults of ``ZeroSpec``), and three steps down from them, in elements. A plan takes the
first that fit: larger ones save collectives, smaller ones memory. The steps are the planner's choice, factors of 2 to
5: below the last one a weight of a large model is a bucket by itself."""


def sized(setup: Setup, level: int) -> Setup:
    """The setup with ``SIZES[level]``, as far as they are keys of its engine that the rung does not set itself."""
    strategy = setup.strategy
    keys = {"zero1": _STAGE_1_AND_2, "zero2": _STAGE_1_AND_2, "zero3": _STAGE_3}.get(strategy.kind, ())
    own = strategy.zero.model_fields_set
    chosen = {name: size for name, size in SIZES[level].items() if name in keys and name not in own}
    return replace(setup, strategy=strategy.replace(zero=strategy.zero.replace(**chosen))) if chosen else setup


@lru_cache(maxsize=8192)
def levels(setup: Setup) -> tuple[Setup, ...]:
    """The setup with each of :data:`SIZES` that differs, DeepSpeed's own first."""
    return tuple(dict.fromkeys(sized(setup, level) for level in range(len(SIZES))))
