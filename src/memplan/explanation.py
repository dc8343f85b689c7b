"""``--explain``: what the peak consists of, term by term, with the formula, its numbers and its source."""

from __future__ import annotations

from collections import Counter

from memplan.engines.plain import Parts, Run
from memplan.memory.optimizers import rounded
from memplan.memory.timeline import COMPONENTS
from memplan.results import GpuMemory, Term
from memplan.tape.tape import Tape

SOURCES = {
    "activations": "torch autograd (derivatives.yaml): what {name} saves for its backward",
    "logits": "transformers/loss/loss_utils.py, torch cross_entropy",
    "temporaries": "alive within an operation: torch/csrc/autograd",
    "gradients": "torch/csrc/autograd/functions/accumulate_grad.cpp: the gradient's own tensor is kept",
}


def explain(run: Run, tape: Tape, phase: str, parts: Parts, memory: GpuMemory) -> tuple[Term, ...]:
    """The terms of a peak in ``phase``; ``tape`` ran every layer of one micro-batch.

    The terms sum to ``peak_device``. Tensors are grouped by the operation that made them, their shape and dtype.
    """
    terms = _states(run, parts)
    if phase in ("forward", "loss", "backward"):
        terms += _tensors(tape, phase)
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
        terms += [_plain_term(name, parts) for name in ("activations", "logits", "temporaries") if parts.get(name)]
    told: Counter[str] = Counter()
    for term in terms:
        told[term.name.split(":")[0]] += term.bytes
    components = memory.components
    rest = components.allocated - sum(told.values())
    if rest:
        terms.append(
            Term(
                name="temporaries: not split off",
                formula="what a block is larger than its tensor",
                filled=f"{rest:,}",
                bytes=rest,
                source="CUDACachingAllocator::should_split: remainders up to 1 MiB stay with the block",
            )
        )
    terms += [
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
    return tuple(terms)


def _states(run: Run, parts: Parts) -> list[Term]:
    """Weights, gradients, optimizer states: elements times bytes, dtype by dtype."""
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
                source="config.json; transformers from_pretrained(dtype=...)",
            )
        )
    rest = parts.get("weights", 0) - weights
    if rest:
        terms.append(
            Term(
                name="weights: buffers and rounding",
                formula="buffers + rounding of each tensor up to 512 bytes",
                filled=f"{run.buffer_bytes:,} + {rest - run.buffer_bytes:,}",
                bytes=rest,
                source="kMinBlockSize of CUDACachingAllocator",
            )
        )
    trainable = run.trainable
    kept = sum(rounded(p.nbytes) * count for p, count in trainable)
    if parts.get("gradients") == kept:
        terms.append(
            Term(
                name="gradients: of all trained weights",
                formula="trained elements x bytes",
                filled=" + ".join(f"{n:,} x {size}" for (_, size, trained), n in by_dtype.items() if trained),
                bytes=kept,
                source=SOURCES["gradients"],
            )
        )
    for name, formula, source in (
        ("optimizer", f"states of {type(run.optimizer).__name__} for each trained weight", "memory/optimizers.py"),
        ("communication", "DDP buckets: one more copy of the gradients", "torch/csrc/distributed/c10d/reducer.cpp"),
        ("workspace", "cuBLAS, one per thread that runs GEMMs", "aten/src/ATen/cuda/CublasHandlePool.cpp"),
    ):
        if parts.get(name):
            terms.append(Term(name=name, formula=formula, filled=f"{parts[name]:,}", bytes=parts[name], source=source))
    return terms


def _plain_term(name: str, parts: Parts) -> Term:
    return Term(
        name=name, formula="alive in this phase", filled=f"{parts[name]:,}", bytes=parts[name], source=SOURCES[name]
    )


def _tensors(tape: Tape, phase: str) -> list[Term]:
    """The tape's tensors that are alive at the phase's fullest moment, like with like."""
    alive = _alive_at_peak(tape, phase)
    groups: Counter[tuple[str, str, tuple[int, ...], str, int]] = Counter()
    for i in alive:
        shape, dtype = tape.shapes[i]
        groups[COMPONENTS[tape.components[i]], tape.names[i], shape, dtype.name, tape.sizes[i]] += 1
    terms = []
    for (component, name, shape, type_name, size), count in sorted(groups.items(), key=lambda g: -g[0][4] * g[1]):
        terms.append(
            Term(
                name=f"{component}: {name}",
                formula="tensors x shape x bytes",
                filled=f"{count} x {' x '.join(map(str, shape)) or 1} ({type_name})",
                bytes=size * count,
                source=SOURCES[component].format(name=name),
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
