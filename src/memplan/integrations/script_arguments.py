"""memplan's part of a training script's command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from memplan.errors import PreflightError, SpecError
from memplan.integrations.live import asked_for
from memplan.specs._base import LARGEST_INT

__all__ = ["MemplanArguments"]

_ON_FAILURE = ("raise", "warn", "exit", "off")


@dataclass
class MemplanArguments:
    """Options of a training script, for transformers' ``HfArgumentParser``.

    ::

        parser = HfArgumentParser((ModelArguments, TrainingArguments, memplan.MemplanArguments))
        model_args, args, memory = parser.parse_args_into_dataclasses()
        args = memory.prepare(model_args.model_name_or_path, args)   # before a weight is loaded
        trainer = Trainer(model, args, callbacks=memory.callbacks(), ...)
    """

    preflight: str = field(
        default="exit",
        metadata={
            "help": "What is done if the run cannot work: raise an error, warn, exit with 1; off does not ask.",
            "choices": list(_ON_FAILURE),
        },
    )
    preflight_seq_len: int | None = field(default=None, metadata={"help": "Tokens of the longest sequence."})
    preflight_packed: bool | None = field(default=None, metadata={"help": "Whether sequences are full, with no mask."})
    preflight_dtype: str | None = field(
        default=None, metadata={"help": "What from_pretrained loads: auto, float32, bfloat16 or float16."}
    )
    preflight_lengths: str | None = field(
        default=None, metadata={"help": "A file with the number of tokens of each text of the dataset."}
    )
    preflight_cluster: str | None = field(
        default=None, metadata={"help": "Where it will run, as in 2x8xH100-80GB, if that is not here."}
    )
    largest_batch: bool = field(
        default=False,
        metadata={"help": "Train with the largest micro-batch that fits; the batch over all GPUs stays as it is."},
    )
    watch_memory: bool = field(
        default=True, metadata={"help": "Put what the run takes beside what was predicted, after step 2."}
    )

    def __post_init__(self) -> None:
        if self.preflight not in _ON_FAILURE:
            raise SpecError.at("preflight", self.preflight, "is not known", f"Use {' or '.join(_ON_FAILURE)}.")

    def prepare(self, model: Any, args: Any, **options: Any) -> Any:
        """Check the run as :func:`memplan.preflight` does, and return its arguments.

        With ``largest_batch`` they are new ones, whose micro-batch is the largest that fits, and whose accumulation
        makes as many sequences of a step. ``options`` are preflight's; what the command line says goes before them.
        Raises what :func:`memplan.preflight` and :func:`memplan.largest_batch` raise.
        """
        from memplan.checks import preflight

        asked = self._asked(options)
        if self.largest_batch:
            args = _with_largest_batch(model, args, asked)
        if self.preflight != "off":
            preflight(model, args, on_failure=self.preflight, **asked)  # type: ignore[arg-type]  # is checked above
        return args

    def callbacks(self) -> list[Any]:
        """Return the callbacks of a Trainer: a :class:`memplan.MemoryCallback`, unless it is not wanted."""
        from memplan.integrations.callback import MemoryCallback

        return [MemoryCallback(training=self._training(), cluster=self.preflight_cluster)] if self.watch_memory else []

    def _training(self) -> dict[str, Any]:
        given = {"seq_len": self.preflight_seq_len, "packed": self.preflight_packed, "dtype": self.preflight_dtype}
        return {name: value for name, value in given.items() if value is not None}

    def _asked(self, options: dict[str, Any]) -> dict[str, Any]:
        asked = {**options, "training": {**asked_for(options.get("training")), **self._training()}}
        given = {"cluster": self.preflight_cluster, "lengths": self.preflight_lengths}
        return asked | {name: value for name, value in given.items() if value is not None}


def _with_largest_batch(model: Any, args: Any, asked: dict[str, Any]) -> Any:
    """TrainingArguments made anew: DeepSpeed's config has been filled in with the batch that they had."""
    from memplan.integrations.largest import in_step

    share = 1
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_INT:
            raise SpecError.at(name, value, "is not a positive integer", f"Use 1 to {LARGEST_INT}.")
        share *= value
    try:
        size = in_step(model, args, share=share, **asked)
    except PreflightError:
        return args  # which preflight will say
    return dataclasses.replace(args, per_device_train_batch_size=size, gradient_accumulation_steps=share // size)
