"""What Trainer.evaluate keeps of its batches.

Sources: evaluation_loop in transformers/trainer.py; EvalLoopContainer and nested_numpify in trainer_pt_utils.py, 5.23;
gather in accelerate/utils/operations.py, 1.15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from memplan.memory.course import Ledger

Handle = TypeVar("Handle")
"""Stands for a tensor that is alive."""


class Prediction(NamedTuple):
    """A tensor that is kept of every batch: logits, or labels."""

    nbytes: int
    is_widened: bool
    """NumPy has no bfloat16: on the host it is copied to float32."""


class Kept(NamedTuple):
    """What is kept of evaluation's batches."""

    predictions: Sequence[Prediction]
    """Of each batch; none without compute_metrics."""
    steps: int
    """Batches kept on the GPU: ``eval_accumulation_steps``."""

    def whole(self, ranks: int) -> list[Prediction]:
        """All batches' predictions, of all ranks."""
        return [Prediction(each.nbytes * ranks * self.steps, each.is_widened) for each in self.predictions]


def pile_up(
    kept: Kept,
    ranks: int,
    forward: Callable[[], None],
    allocate: Callable[[Sequence[int]], list[Handle]],
    free: Callable[[Iterable[Handle]], None],
    *,
    gathers: bool,
) -> list[Handle]:
    """Run the batches up to the last whose predictions stay on the GPU; return all of them.

    Between the first two and the last two batches only predictions are added, and ``forward`` is not called. Each
    batch's are put behind those before by a copy; the last ones stay in the loop's variables meanwhile.
    """
    sizes = [each.nbytes for each in kept.predictions]
    gathered: list[Handle] = []
    container: list[Handle] = []
    for batch in range(kept.steps):
        if batch < 2 or batch >= kept.steps - 2:
            forward()
        local = allocate(sizes)
        if batch > 1:  # the first batch's are the container's
            free(gathered)
        gathered = local
        if gathers:
            gathered = allocate([nbytes * ranks for nbytes in sizes])
            free(local)
        if batch == 0:
            container = gathered
            continue
        joined: list[Handle] = []
        for old, nbytes in zip(container, sizes, strict=True):
            joined += allocate([nbytes * ranks * (batch + 1)])
            free([old])
        container = joined
    return container


FORWARDS = 5
"""Most batches that an engine is played over: one before, and four that :func:`pile_up` runs."""


def to_host(ledger: Ledger, kept: Kept, ranks: int) -> None:
    """nested_numpify: every rank has all ranks' predictions on the host.

    They are those of ``kept.steps`` batches. A data set that has more of them leaves as much for each further so many;
    how large it is memplan is not told.
    """
    arrays = []
    for whole in kept.whole(ranks):
        copy = ledger.allocate("logits", whole.nbytes, "host")
        if whole.is_widened:
            array = ledger.allocate("logits", 2 * whole.nbytes, "host")
            ledger.free(copy)
            copy = array
        arrays.append(copy)
    ledger.free(*arrays)
