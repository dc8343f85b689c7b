"""What only a notebook has: an estimate with sliders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING, Any

from memplan import api
from memplan.case import ClusterLike, ModelLike, SoftwareLike, TrainingLike
from memplan.errors import MemplanError
from memplan.specs.training import TrainingSpec

if TYPE_CHECKING:
    from memplan.render.what_if import WhatIf
    from memplan.results import Estimate

__all__ = ["what_if"]

# What the sliders offer, beside what was asked for.
MICRO_BATCHES = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64)
LENGTHS = tuple(sorted({2**n for n in range(7, 16)} | {3 * 2**n for n in range(8, 13)}))
SHARDED = ("zero1", "zero2", "zero3", "fsdp")


def what_if(
    model: ModelLike,
    training: TrainingLike = None,
    cluster: ClusterLike = None,
    *,
    software: SoftwareLike = None,
) -> WhatIf:
    """Show an estimate with sliders for micro-batch, sequence length, strategy and checkpointing, in a notebook.

    Arguments and errors are those of :func:`memplan.estimate`; the sliders start at what they say. What is refused
    shows its message in place of the estimate. Raises UnsupportedError without ipywidgets, of the ``notebook`` extra.
    """
    from memplan.render.what_if import WhatIf

    run = training if isinstance(training, TrainingSpec) else TrainingSpec(**(training or {}))
    setup = api.estimate(model, run, cluster, software=software, replay=False)  # a mistake is raised here
    several = setup.cluster["gpus"] > 1
    choices: dict[str, Sequence[Any]] = {
        "micro_batch_size": sorted({*MICRO_BATCHES, run.micro_batch_size}),
        "seq_len": sorted({*LENGTHS, run.seq_len}),
        "strategy": ("ddp" if several else "single", *SHARDED),
        "gradient_checkpointing": (False, True),
    }
    chosen = {name: setup.setup[name] for name in choices}

    def estimated(options: Mapping[str, Any]) -> Estimate:
        own = {name: value for name, value in options.items() if name != "strategy"}
        return api.estimate(model, run.replace(**own), cluster, options["strategy"], software=software)

    # The first run of a strategy takes several times as long as what follows, so all of them come first.
    for strategy, checkpointing in product(choices["strategy"], choices["gradient_checkpointing"]):
        with suppress(MemplanError):
            estimated({**chosen, "strategy": strategy, "gradient_checkpointing": checkpointing})
    return WhatIf(estimated, choices, chosen)
