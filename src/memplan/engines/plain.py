"""Plain training: one whole copy of everything.

Source: transformers/trainer.py (training_step, _inner_training_loop), 5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from memplan.memory.evaluation import Kept
from memplan.memory.optimizers import Optimizer, clip_grad_norm, rounded
from memplan.memory.timeline import COMPONENTS, Moment, StepProfile, Unrolled
from memplan.tape.dispatch import DeviceRules
from memplan.tape.tape import GRADIENT, INPUT
from memplan.tape.tensor import Parameter

Parts = dict[str, int]
"""Component -> bytes alive."""


class Evaluation(NamedTuple):
    """What one batch of evaluation needs, and what is kept of it."""

    fullest: Moment
    """The fullest moment of a batch's forward."""
    kept: Kept


@dataclass(frozen=True)
class Run:
    """What an engine places: the model's parameters and the profile of one micro-batch."""

    parameters: Sequence[tuple[Parameter, int]]
    """Each made parameter once, with how many of the model it stands for."""
    buffer_bytes: int
    unrolled: Unrolled
    """A micro-batch; where gradients are there to add to, one that finds them."""
    first: Unrolled
    """That of the first step which is fullest: the first, or a later one."""
    evaluation: Evaluation | None
    optimizer: Optimizer
    grad_accum_steps: int
    keeps_gradients: bool
    """From one step to the next, rather than from backward to zero_grad."""
    rules: DeviceRules
    workspaces: tuple[int, ...]
    """cuBLAS's, inside the allocator's memory: from the first step on."""

    @cached_property
    def profile(self) -> StepProfile:
        """Of the micro-batch."""
        return self.unrolled.profile()

    @cached_property
    def trainable(self) -> list[tuple[Parameter, int]]:
        """The parameters that require a gradient."""
        return [(p, count) for p, count in self.parameters if p.node is not None]

    @cached_property
    def stepped(self) -> list[tuple[Parameter, int]]:
        """Those of them that get one, and so are clipped and have optimizer states."""
        return [(p, count) for p, count in self.trainable if not p.unused]

    @property
    def inputs(self) -> int:
        """Bytes of one micro-batch's inputs."""
        return self.profile.end.parts[INPUT]

    @property
    def waiting_inputs(self) -> int:
        """Bytes of the inputs of the step's other micro-batches: all are on the GPU before the first runs, and stay
        until the next step's are (get_batch_samples).
        """
        return (self.grad_accum_steps - 1) * self.inputs


class States(NamedTuple):
    """What lives from one step to the next, in bytes."""

    weights: int
    gradients: int
    """While they exist: from a parameter's backward on."""
    optimizer: int
    step_temporaries: int
    """At the fullest moment of clipping the gradients and stepping."""


def states(run: Run) -> States:
    """Bytes of weights, gradients and optimizer states of one whole copy, every tensor rounded up to a block.

    A gradient is taken to be as large as its weight. One that torch keeps as a view of something larger is not: a
    ViT's class token at micro-batch 1 has a view of all positions' gradient.
    """
    weights = sum(rounded(p.nbytes) * count for p, count in run.parameters) + run.buffer_bytes
    stepped = run.stepped
    gradients = sum(rounded(p.nbytes) * count for p, count in stepped)
    optimizer = sum(sum(run.optimizer.state_bytes(p)) * count for p, count in stepped)
    optimizer += sum(run.optimizer.shared_bytes(stepped))
    clipping = sum(size * count for size, count in clip_grad_norm(stepped, run.rules))
    return States(weights, gradients, optimizer, max(clipping, run.optimizer.temporaries.peak))


def phases(run: Run, communication: int = 0, ranks: int = 1, *, gradients_in_buckets: bool = False) -> dict[str, Parts]:
    """The fullest moment of every phase, by component. ``communication`` bytes are held throughout, and predictions
    are gathered from ``ranks``. With ``gradients_in_buckets`` they have no memory of their own once backward is over.
    """
    held = states(run)
    base = {
        "weights": held.weights,
        "workspace": sum(rounded(size) for size in run.workspaces),
        "communication": communication,
        "activations": run.waiting_inputs,
    }
    accumulating = run.grad_accum_steps > 1
    resting = base | {"optimizer": held.optimizer}
    end = run.profile.end
    kept = held.gradients if run.keeps_gradients and not gradients_in_buckets else 0
    between = resting | {"activations": end.total - end.parts[GRADIENT] + run.waiting_inputs, "gradients": kept}

    def during(parts: Parts, moment: Moment, gradients: int) -> Parts:
        result = dict(parts)
        for name, size in zip(COMPONENTS, moment.parts):
            result[name] = result.get(name, 0) + size
        result["gradients"] = result.get("gradients", 0) + gradients
        return result

    before = held.gradients if accumulating else 0
    old = before or kept
    result = {"load": {"weights": held.weights, "communication": communication}}
    if run.optimizer.made_at_construction:
        result["load"]["optimizer"] = held.optimizer
    stepping = between | {"temporaries": held.step_temporaries}
    if not gradients_in_buckets:
        stepping["gradients"] = held.gradients
    before_step = resting if run.optimizer.made_at_construction else base
    first: list[Parts] = [during(before_step, moment, before) for moment in run.first.profile().peaks.values()]
    fullest: Parts = max([*first, stepping], key=total)
    result["first_step"] = dict(fullest)
    for name, moment in run.profile.peaks.items():
        result[name] = during(resting, moment, old)
    result["step"] = stepping
    result["idle"] = between
    if run.evaluation is not None:
        result["eval"] = _evaluating(run.evaluation, ranks, during(between, run.evaluation.fullest, 0), between)
    result["save"] = dict(between)
    return result


def _evaluating(evaluation: Evaluation, ranks: int, forward: Parts, resting: Parts) -> Parts:
    """The fullest moment of the last batch that :func:`~memplan.memory.evaluation.pile_up` runs; ``forward`` is without
    the others.
    """
    kept = evaluation.kept
    one, before, all_ = (
        sum(rounded(nbytes * ranks * batches) for nbytes, _ in kept.predictions)
        for batches in (1, kept.steps - 1, kept.steps)
    )
    local = sum(rounded(nbytes) for nbytes, _ in kept.predictions)
    # The first batch's are both the loop's and the container's.
    running = _more(forward, "logits", before + (one if kept.steps > 2 else 0))
    gathering = _more(resting, "logits", before + one + (local if ranks > 1 else 0))
    copying = _more(resting, "logits", before + one + (all_ if kept.steps > 1 else 0))
    return max(running, gathering, copying, key=total)


def _more(parts: Parts, component: str, nbytes: int) -> Parts:
    return parts | {component: parts.get(component, 0) + nbytes}


def total(parts: Parts) -> int:
    """All bytes of a moment."""
    return sum(parts.values())
