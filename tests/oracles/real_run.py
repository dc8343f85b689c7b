"""A real training run on CPU: transformers.Trainer with data, and what its second step allocates.

The check of the check: the trace (O1) is compared with PyTorch's own allocator events, which also show what a trace
cannot see, the workspace that a kernel takes inside one call.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 512


@dataclass(frozen=True)
class RealStep:
    """The second optimizer step of a run.

    Attributes:
        peak: the largest running sum of its allocations over the level at its start, each rounded up to 512 bytes.
        at_peak: the sizes alive then, rounded, each with the operator (innermost last) that allocated it.
    """

    peak: int
    at_peak: list[tuple[int, tuple[str, ...]]]


def real_step(
    model: Any, directory: Path, *, batch: int, length: int, vocab: int, classes: bool = False, **arguments: Any
) -> RealStep:
    """Train ``model`` for two steps by transformers.Trainer on CPU and return the second one's allocations."""
    import torch
    import transformers
    from torch.profiler import ProfilerActivity, profile

    class Rows(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, Any]:
            tokens = torch.randint(5, vocab, (length,))
            return {"input_ids": tokens, "labels": torch.tensor(0) if classes else tokens.clone()}

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    class SecondStep(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                gc.collect()
                profiler.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                profiler.stop()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = transformers.TrainingArguments(
            output_dir=str(directory),
            use_cpu=True,
            per_device_train_batch_size=batch,
            max_steps=2,
            report_to=[],
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            **arguments,
        )
        transformers.Trainer(model=model, args=training, train_dataset=Rows(), callbacks=[SecondStep()]).train()
        path = directory / "trace.json"
        profiler.export_chrome_trace(str(path))
    return peak_of(json.loads(path.read_text(encoding="utf-8")))


def peak_of(trace: Mapping[str, Any]) -> RealStep:
    """The fullest moment of a profile with ``profile_memory=True``, exported as a Chrome trace and loaded."""
    events = trace["traceEvents"]
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    live = peak = 0
    alive: dict[int, dict[str, Any]] = {}
    at_peak: list[dict[str, Any]] = []
    for event in memory:
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0:
            alive[address] = event
            live += _rounded(size)
        else:
            alive.pop(address, None)
            live -= _rounded(-size)
        if live > peak:
            peak, at_peak = live, list(alive.values())
    operators = sorted((event for event in events if event.get("cat") == "cpu_op"), key=lambda event: event["ts"])
    return RealStep(peak, [(_rounded(event["args"]["Bytes"]), _around(event["ts"], operators)) for event in at_peak])


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _around(moment: float, operators: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(op["name"] for op in operators if op["ts"] <= moment <= op["ts"] + op["dur"])
