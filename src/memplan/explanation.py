"""``--explain``: what the peak consists of, term by term, with the formula, its numbers and its source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from memplan.engines.plain import Parts, Run
from memplan.inference import Inference
from memplan.memory.course import ExplainingLedger
from memplan.memory.loading import Held
from memplan.memory.optimizers import rounded
from memplan.memory.timeline import COMPONENTS
from memplan.results import GpuMemory, Term
from memplan.specs.strategy import Strategy
from memplan.tape.tape import Tape
from memplan.tape.tensor import Buffer, Parameter

SHOWN = 4
"""Sizes of blocks that a term shows."""
SOURCES = {
    "weights": "config.json; transformers from_pretrained(dtype=...)",
    "blocks": "CUDACachingAllocator::should_split: remainders up to 1 MiB stay with the block",
    "load": "transformers/modeling_utils.py: caching_allocator_warmup; integrations/bitsandbytes.py; "
    "torch/csrc/distributed/c10d/comm.cpp: broadcast_coalesced",
    "passing": "alive within a forward pass without gradients: transformers/generation/utils.py",
    "activations": "torch autograd (derivatives.yaml): what {name} saves for its backward",
    "logits": "transformers/loss/loss_utils.py, torch cross_entropy",
    "temporaries": "alive within an operation: torch/csrc/autograd",
    "gradients": "torch/csrc/autograd/functions/accumulate_grad.cpp: the gradient's own tensor is kept",
}
WORKSPACE = "aten/src/ATen/cuda/CublasHandlePool.cpp"


def explain(run: Run, tape: Tape, phase: str, parts: Parts, memory: GpuMemory) -> tuple[Term, ...]:
    """The terms of a peak in ``phase``; ``tape`` ran every layer of one micro-batch.

    The terms sum to ``peak_device``. Tensors are grouped by the operation that made them, their shape and dtype.
    """
    running = phase in ("forward", "loss", "backward")
    alive = _alive_at_peak(tape, phase) if running else set[int]()
    terms = _states(run, parts, _gradients(tape, alive))
    if running:
        terms += _tensors(tape, alive)
        if run.waiting_inputs:
            terms.append(
                Term(
                    name="activations: inputs of the other micro-batches",
                    formula="(gradient accumulation steps - 1) x inputs",
                    filled=f"{run.grad_accum_steps - 1} x {run.inputs:,}",
                    bytes=run.waiting_inputs,
                    source="transformers/trainer.py: get_batch_samples takes all of a step's micro-batches at once",
                )
            )
    else:
        source = SOURCES["load"] if phase == "load" else None
        passing = ("activations", "logits", "temporaries")
        terms += [_plain_term(name, parts, source) for name in passing if parts.get(name)]
    what = "what a block is larger than its tensor"
    return (*terms, *_remaining(terms, memory, what, SOURCES["blocks"]))


ENGINES = {
    "zero0": "deepspeed/runtime/fp16/unfused_optimizer.py",
    "zero1": "deepspeed/runtime/zero/stage_1_and_2.py",
    "zero2": "deepspeed/runtime/zero/stage_1_and_2.py",
    "zero3": "deepspeed/runtime/zero/stage3.py, partitioned_param_coordinator.py",
    "fsdp1": "torch/distributed/fsdp (version 1: _flat_param.py, _runtime_utils.py)",
    "fsdp2": "torch/distributed/fsdp (version 2: _fully_shard)",
}


def explain_sharded(strategy: Strategy, found: ExplainingLedger, memory: GpuMemory) -> tuple[Term, ...]:
    """The terms of a peak under an engine that shards: its blocks by what they are, and the tape's tensors.

    They sum to ``peak_device``.
    """
    engine = ENGINES[f"fsdp{strategy.fsdp.version}" if strategy.kind == "fsdp" else strategy.kind]
    named: dict[tuple[str, str], Counter[int]] = {}
    for (component, name, nbytes), count in found.blocks.items():
        named.setdefault((component, name), Counter())[nbytes] += count
    terms = []
    for (component, name), sizes in named.items():
        total = sum(nbytes * count for nbytes, count in sizes.items())
        what, _, keys = name.partition(" (")
        if total:
            terms.append(
                Term(
                    name=f"{component}: {what}" if what else component,
                    formula="blocks x bytes" + (f", sized by {keys.removesuffix(')')}" if keys else ""),
                    filled=_largest(sizes),
                    bytes=total,
                    source=WORKSPACE if component == "workspace" else engine,
                )
            )
    terms.sort(key=lambda term: -term.bytes)
    if found.tape is not None:
        terms += _tensors(found.tape, set(found.tensors))
    return (*terms, *_remaining(terms, memory, "what a block is larger than its tensor", SOURCES["blocks"]))


class AliveBlock(NamedTuple):
    """Blocks of the GPU's memory that are alike."""

    bytes: int
    """Of one."""
    number: int
    name: str
    """Component and what it is: ``optimizer: state of AdamW``."""


def blocks(
    run: Run, tape: Tape, buffers: Iterable[int], buckets: Iterable[int], phase: str, parts: Parts
) -> list[AliveBlock]:
    """What is alive at the fullest moment of ``phase``, of which the parts are ``parts``, block by block.

    ``buffers`` are the model's, ``buckets`` DDP's, in bytes. The blocks sum to the parts: what has none of its own on
    the tape, as of clipping and stepping, is one.
    """
    found: Counter[tuple[int, str]] = Counter()
    for p, count in run.parameters:
        found[rounded(p.nbytes), f"weights: {_shape(p)}"] += count
    for nbytes in buffers:
        found[nbytes, "weights: buffer"] += 1
    for nbytes in buckets:
        found[rounded(nbytes), "communication: bucket of DDP"] += 1
    alive = _alive_at_peak(tape, phase) if phase in ("forward", "loss", "backward") else set[int]()
    for i in alive:
        name, shape, dtype = tape.births[i]
        text = f"{COMPONENTS[tape.components[i]]}: {name} {' x '.join(map(str, shape)) or 1} {dtype.name}"
        found[tape.sizes[i], text] += 1
    of_tape = _gradients(tape, alive)
    for p, count in run.stepped:
        if parts.get("gradients", 0) > of_tape:
            found[rounded(p.nbytes), f"gradients: of {_shape(p)}"] += count
        if parts.get("optimizer"):
            for nbytes in run.optimizer.state_bytes(p):
                found[nbytes, f"optimizer: state of {type(run.optimizer).__name__}"] += count
    if parts.get("optimizer"):
        for nbytes in run.optimizer.shared_bytes(run.stepped):
            found[nbytes, "optimizer: shared state"] += 1
    for nbytes in run.workspaces if parts.get("workspace") else ():
        found[rounded(nbytes), "workspace: cuBLAS"] += 1
    return _with_the_rest(found, parts)


def blocks_sharded(found: ExplainingLedger, parts: Parts) -> list[AliveBlock]:
    """As :func:`blocks`, under an engine that shards."""
    alive: Counter[tuple[int, str]] = Counter()
    for (component, name, nbytes), count in found.blocks.items():
        alive[nbytes, f"{component}: {name}" if name else component] += count
    if found.tape is not None:
        for i in found.tensors:
            name, shape, dtype = found.tape.births[i]
            component = COMPONENTS[found.tape.components[i]]
            alive[found.tape.sizes[i], f"{component}: {name} {' x '.join(map(str, shape)) or 1} {dtype.name}"] += 1
    return _with_the_rest(alive, parts)


def _with_the_rest(found: Counter[tuple[int, str]], parts: Parts) -> list[AliveBlock]:
    told: Counter[str] = Counter()
    for (nbytes, name), count in found.items():
        told[name.split(":")[0]] += nbytes * count
    for component, nbytes in parts.items():
        if nbytes > told[component]:
            found[nbytes - told[component], f"{component}: not told apart"] += 1
    return [AliveBlock(nbytes, count, name) for (nbytes, name), count in found.items() if nbytes]


def _shape(p: Parameter) -> str:
    return f"{' x '.join(map(str, p.shape)) or 1} {p.dtype.name}"


def _largest(sizes: Counter[int]) -> str:
    """Blocks of a kind, those first that take the most together."""
    ranked = sorted(sizes.items(), key=lambda each: -each[0] * each[1])
    told = [f"{count:,} x {nbytes:,}" for nbytes, count in ranked[:SHOWN] if nbytes]
    others = sum(count for _, count in ranked[SHOWN:])
    return " + ".join(told) + (f" + {others:,} smaller" if others else "")


def explain_inference(found: Inference, memory: GpuMemory) -> tuple[Term, ...]:
    """The terms of the peak of loading or of generation, on the fullest GPU. They sum to ``peak_device``."""
    phase = memory.peak_phase
    parts = found.placed[phase]
    terms = _loaded(found.on_gpu, parts.get("weights", 0))
    if parts.get("workspace"):
        terms.append(_workspace(parts))
    if found.generation is not None and phase in found.generation.calls:
        generation, cached = found.generation, found.generation.calls[phase].cached
        alive = found.alive[phase]
        terms += _keys_and_values(generation.tape, alive & cached)
        terms += _tensors(generation.tape, alive - cached, SOURCES["passing"])
    if phase == "load":
        what, source = "on the way: weights before they are quantized, blocks of the warm-up", SOURCES["load"]
    else:
        what, source = "what a block is larger than its tensor", SOURCES["blocks"]
    return (*terms, *_remaining(terms, memory, what, source))


def _remaining(terms: list[Term], memory: GpuMemory, rest_is: str, rest_source: str) -> list[Term]:
    """What is left of the allocator's and the device's memory once ``terms`` are told."""
    found: list[Term] = []
    told: Counter[str] = Counter()
    for term in terms:
        told[term.name.split(":")[0]] += term.bytes
    components = memory.components
    rest = components.allocated - sum(told.values())
    if rest:
        name = "temporaries: on top of the tensors"
        found.append(Term(name=name, formula=rest_is, filled=f"{rest:,}", bytes=rest, source=rest_source))
    found += [
        Term(name=name, formula=formula, filled=f"{size:,}", bytes=size, source=source)
        for name, formula, size, source in (
            (
                "fragmentation",
                "reserved - allocated",
                components.fragmentation,
                "replay of two steps, memory/allocator.py",
            ),
            (
                "context",
                "31 MiB + 2.08 MiB x SMs x threads per SM / 1000",
                components.context,
                "memory/runtime.py, CONTEXT",
            ),
            ("nccl", "buffers x channels x peers", components.nccl, "memory/runtime.py, NCCL"),
        )
        if size
    ]
    return found


def _loaded(held: Sequence[Held], weights: int) -> list[Term]:
    """Weights of each dtype, and buffers."""
    parameters: Counter[tuple[str, int]] = Counter()
    buffers = 0
    for each in held:
        if isinstance(each.tensor, Buffer):
            buffers += each.tensor.nbytes
        else:
            parameters[each.tensor.dtype.name, each.tensor.dtype.itemsize] += each.tensor.numel
    terms = [
        Term(
            name=f"weights: {dtype}",
            formula="elements x bytes",
            filled=f"{elements:,} x {itemsize}",
            bytes=elements * itemsize,
            source=SOURCES["weights"],
        )
        for (dtype, itemsize), elements in parameters.items()
    ]
    rest = weights - sum(term.bytes for term in terms)
    return [*terms, _rounding(buffers, rest)] if rest else terms


def _rounding(buffers: int, rest: int) -> Term:
    return Term(
        name="weights: buffers and rounding",
        formula="buffers + rounding of each tensor up to 512 bytes",
        filled=f"{buffers:,} + {rest - buffers:,}",
        bytes=rest,
        source="kMinBlockSize of CUDACachingAllocator",
    )


def _workspace(parts: Parts) -> Term:
    return Term(
        name="workspace",
        formula="cuBLAS, one per thread that runs GEMMs",
        filled=f"{parts['workspace']:,}",
        bytes=parts["workspace"],
        source=WORKSPACE,
    )


def _keys_and_values(tape: Tape, alive: set[int]) -> list[Term]:
    """The cache as it is at the peak: where a layer's is just being extended, the old one and the new."""
    groups = Counter((*tape.births[i][1:], tape.sizes[i]) for i in alive)
    return [
        Term(
            name="activations: keys and values",
            formula="tensors (2 per layer) x sequences x heads x positions x head size x bytes",
            filled=f"{count} x {' x '.join(map(str, shape))} x {dtype.itemsize}",
            bytes=size * count,
            source="transformers/cache_utils.py: DynamicCache",
        )
        for (shape, dtype, size), count in sorted(groups.items(), key=lambda group: -group[0][2] * group[1])
    ]


def _gradients(tape: Tape, alive: Iterable[int]) -> int:
    """Bytes of those that the micro-batch itself has made."""
    return sum(tape.sizes[i] for i in alive if COMPONENTS[tape.components[i]] == "gradients")


def _states(run: Run, parts: Parts, of_tape: int) -> list[Term]:
    """Weights, gradients, optimizer states: elements times bytes, dtype by dtype. Gradients ``of_tape`` are its."""
    terms: list[Term] = []
    by_dtype: Counter[tuple[str, int, bool]] = Counter()
    for p, count in run.parameters:
        by_dtype[p.dtype.name, p.dtype.itemsize, p.node is not None] += p.numel * count
    weights = 0
    for (dtype, itemsize, trained), elements in by_dtype.items():
        weights += elements * itemsize
        terms.append(
            Term(
                name=f"weights: {dtype}, {'trained' if trained else 'frozen'}",
                formula="elements x bytes",
                filled=f"{elements:,} x {itemsize}",
                bytes=elements * itemsize,
                source=SOURCES["weights"],
            )
        )
    rest = parts.get("weights", 0) - weights
    if rest:
        terms.append(_rounding(run.buffer_bytes, rest))
    stepped: Counter[int] = Counter()
    for p, count in run.stepped:
        stepped[p.dtype.itemsize] += p.numel * count
    kept = sum(rounded(p.nbytes) * count for p, count in run.stepped)
    if kept and parts.get("gradients", 0) - of_tape == kept:
        terms.append(
            Term(
                name="gradients: of all trained weights",
                formula="trained elements x bytes",
                filled=" + ".join(f"{n:,} x {size}" for size, n in stepped.items()),
                bytes=kept,
                source=SOURCES["gradients"],
            )
        )
    for name, formula, source in (
        ("optimizer", f"states of {type(run.optimizer).__name__} for each trained weight", "memory/optimizers.py"),
        ("communication", "DDP buckets: one more copy of the gradients", "torch/csrc/distributed/c10d/reducer.cpp"),
    ):
        if parts.get(name):
            terms.append(Term(name=name, formula=formula, filled=f"{parts[name]:,}", bytes=parts[name], source=source))
    return [*terms, _workspace(parts)] if parts.get("workspace") else terms


def _plain_term(name: str, parts: Parts, source: str | None = None) -> Term:
    source, size = source or SOURCES[name].format(name="each operation"), parts[name]
    return Term(name=name, formula="alive in this phase", filled=f"{size:,}", bytes=size, source=source)


def _tensors(tape: Tape, alive: set[int], source: str = "") -> list[Term]:
    """The tape's tensors that are alive, like with like; ``source`` if it is not by component."""
    groups: Counter[tuple[str, str, tuple[int, ...], str, int]] = Counter()
    for i in alive:
        name, shape, dtype = tape.births[i]
        groups[COMPONENTS[tape.components[i]], name, shape, dtype.name, tape.sizes[i]] += 1
    terms = []
    for (component, name, shape, type_name, size), count in sorted(groups.items(), key=lambda g: -g[0][4] * g[1]):
        terms.append(
            Term(
                name=f"{component}: {name}",
                formula="tensors x shape x bytes",
                filled=f"{count} x {' x '.join(map(str, shape)) or 1} ({type_name})",
                bytes=size * count,
                source=source or SOURCES[component].format(name=name),
            )
        )
    return terms


def _alive_at_peak(tape: Tape, phase: str) -> set[int]:
    """Storages alive when the phase holds the most."""
    starts = {mark.position: mark.name for mark in tape.marks if mark.name in ("loss", "backward")}
    current = "forward"
    height = best = 0
    where = -1
    for i, event in enumerate(tape.log):
        current = starts.get(i, current)
        height += tape.sizes[event] if event >= 0 else -tape.sizes[~event]
        if current == phase and height > best:
            best, where = height, i
    alive: set[int] = set()
    for event in tape.log[: where + 1]:
        if event >= 0:
            alive.add(event)
        else:
            alive.discard(~event)
    return alive
