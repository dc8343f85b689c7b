"""A callback for transformers' Trainer that puts what a run takes beside what was predicted."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from memplan.integrations.live import asked_for
from memplan.integrations.watch import JUDGED_AFTER, Watch, harmless, of_estimate

if TYPE_CHECKING:
    from memplan.results import Estimate

try:
    from transformers import TrainerCallback
except ImportError:  # without transformers nobody can call it
    TrainerCallback = object

__all__ = ["MemoryCallback"]


class MemoryCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]  # transformers has no types here
    """After step 2: measured beside predicted; later a warning if memory drifts or grows, and a record at the end.

    ::

        trainer.add_callback(memplan.MemoryCallback())

    The record is ``memplan-memory.json`` in ``output_dir``, written by the first rank. Without ``estimate`` the run is
    read as :func:`memplan.preflight` reads it, with the longest batch of the first two steps; where that is not
    possible, what is measured is all that is reported.
    """

    def __init__(self, estimate: Estimate | None = None, *, training: Any = None, cluster: Any = None) -> None:
        """``training`` and ``cluster`` are :func:`memplan.preflight`'s. Raises SpecError for what is neither."""
        from memplan.case import cluster_spec

        self.estimate, self.training, self.cluster = of_estimate(estimate), asked_for(training), cluster
        cluster_spec(cluster)
        self.watch: Watch | None = None
        self._seen: dict[str, Any] = {}
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Begin to watch, and to look at what the model is given."""
        self._forget()
        self._seen = {}
        with harmless(self._stop):
            self.watch = Watch(self.estimate, args.output_dir)
            if self.estimate is None and hasattr(model, "register_forward_pre_hook"):
                self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Count the step; of the second one make the report."""
        watch = self.watch
        if watch is None:
            return
        with harmless(self._stop):
            if watch.steps == JUDGED_AFTER - 1 and self.estimate is None:
                self._predict(watch, model, args)
            watch.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the record as it is now."""
        self._forget()
        if self.watch is not None:
            with harmless(self._stop):
                self.watch.finish()

    def _stop(self) -> None:
        self.watch = None

    def _look(self, _module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        shape: tuple[Any, ...] = tuple(getattr(tokens, "shape", ()))
        if len(shape) == 2:
            self._seen["seq_len"] = max(self._seen.get("seq_len", 0), int(shape[1]))
            self._seen["packed"] = kwargs.get("attention_mask") is None

    def _forget(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _predict(self, watch: Watch, model: Any, args: Any) -> None:
        """What preflight would have said, had it known the batches."""
        from memplan.checks import preflight

        self._forget()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = preflight(
                model, args, training={**self._seen, **self.training}, cluster=self.cluster, on_failure="warn"
            )
        if found.check is not None:
            watch.estimate = found.check.estimate
            watch.model, watch.asked = dict(found.model), dict(found.asked)
