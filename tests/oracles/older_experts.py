"""O1 for experts that transformers before 5.0 called one by one: what real steps of those versions allocated, archived.

The loop asks tensors for their values, so they have data here, on CPU; otherwise the step and the ledger are those of
:mod:`memplan.introspect.trace`. What a router chooses is replaced by a choice that spreads the tokens evenly, which is
what an estimate takes for granted. It runs with an older transformers on the path, and the tokenizers and the
huggingface_hub which that asks for, and writes ``benchmarks/measurements/older_transformers/VERSION.json``:

    PYTHONPATH=FOLDER python -m tests.oracles.older_experts sdpa

Every head has a key of its own, and the batch an attention mask of ones: so attention runs as it does today, by sdpa in
4.45 and 4.57, by eager in 4.50 to 4.53, and what is compared is the experts.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.oracles.families import CONFIGS
from tests.oracles.o1 import PRECISIONS

from memplan.introspect import trace

ARCHIVE = Path(__file__).parents[2] / "benchmarks" / "measurements" / "older_transformers"
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
NOT_MODELLED = {"mixtral": ("4.45", "4.46", "4.47")}
_NO_DECAY = (r"bias", r"norm")


def values_of(family: str) -> dict[str, Any]:
    """The family's small config, with a key for each head, no window, and few words, so that layers decide peaks."""
    values = {**CONFIGS[family]["small"], "vocab_size": 256}
    return values | {"num_key_value_heads": values["num_attention_heads"], "sliding_window": None}


def experts_of(values: Mapping[str, Any]) -> int:
    """How many experts a config has."""
    found: int = next(values[name] for name in ("num_local_experts", "num_experts") if name in values)
    return found


def grid(attn: str) -> list[dict[str, Any]]:
    """Options of :func:`trace_experts`."""
    sizes = {"num_layers": 2, "micro_batch_size": 2, "seq_len": 100, "attn": attn}
    lora = {"rank": 8, "targets": ["q_proj", "v_proj"]}
    hows: tuple[dict[str, Any], ...] = (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "use_reentrant": False},
        {"gradient_checkpointing": True, "use_reentrant": True, "lora": lora},
        {"gradient_checkpointing": False, "seq_len": 333, "lora": {"rank": 4, "targets": "all-linear"}},
    )
    found = [{**precision, **sizes, **how} for precision in PRECISIONS.values() for how in hows]
    found.append({**PRECISIONS["pure_bf16"], **sizes, "gradient_checkpointing": False, "grad_accum_steps": 2})
    found.append({**PRECISIONS["autocast"], **sizes, "gradient_checkpointing": False, "seq_len": 1})
    return found


@contextmanager
def even_router(values: Mapping[str, Any]) -> Iterator[None]:
    """Let torch.topk give the k-th choice of all tokens, one k after the other, to the experts in equal parts."""
    import torch

    choose, experts, top_k = torch.topk, experts_of(values), values["num_experts_per_tok"]

    def topk(x: Any, k: int, dim: int = -1, **kwargs: Any) -> Any:
        out = choose(x, k, dim, **kwargs)
        if (x.dim(), x.shape[-1], k) == (2, experts, top_k):
            taken = len(x) * top_k
            bounds = [taken * i // experts for i in range(experts + 1)]
            chosen = [i for i, (start, end) in enumerate(pairwise(bounds)) for _ in range(end - start)]
            # By a buffer's own memory: what the graph has saved keeps its version, and the ledger sees no tensor.
            out.indices.data.numpy()[:] = [chosen[place :: len(x)] for place in range(len(x))]
        return out

    torch.topk = topk  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.topk = choose


def trace_experts(
    values: Mapping[str, Any],
    *,
    dtype: str,
    mixed_precision: str,
    num_layers: int,
    micro_batch_size: int,
    seq_len: int,
    attn: str,
    gradient_checkpointing: bool,
    use_reentrant: bool = False,
    lora: Mapping[str, Any] | None = None,
    grad_accum_steps: int = 1,
    change: Callable[[Any], None] = lambda _model: None,
) -> dict[str, Any]:
    """Two steps of a model with data, the second of which is told: peaks in bytes, by phase, and what forward saved.

    ``change`` is done to the model before it is adapted.
    """
    import torch

    with trace._quiet():
        config = trace._make_config(values, num_layers)
        kind = trace._model_class(values)
        model = kind._from_config(config, torch_dtype=getattr(torch, dtype), attn_implementation=attn)
        change(model)
        names = [[name, list(p.shape)] for name, p in model.named_parameters()]
        if lora is not None:
            model = trace._add_lora(model, lora)
        if gradient_checkpointing:
            trace._enable_checkpointing(model, use_reentrant, frozen_inputs=lora is not None)
    model.config.use_cache = False
    model.train()
    tracker = trace.real_tracker()
    step = trace._Step(model, tracker, mixed_precision, grad_accum_steps, max_grad_norm=1.0, optim="adamw_torch_fused")
    with trace._gc_disabled(), trace._phase_hooks(model, tracker), trace._quiet(), tracker, even_router(values):
        tracker.adopt([*model.parameters(), *model.buffers(), *trace._loose_tensors(model)])
        step.make_inputs(micro_batch_size, seq_len, padded=False)
        for inputs in step.inputs:
            inputs["attention_mask"] = torch.ones((micro_batch_size, seq_len), dtype=torch.int64)
        step.make_optimizer()
        for _ in range(2):
            tracker.start_step(record=False)
            step.run()
        phases = dict(tracker.phases)
    return {"phases": phases, "saved": step.saved_bytes, "parameters": names}


def _know_patterns() -> None:
    """``get_parameter_names`` of older versions takes no patterns, which the trace gives it."""
    from transformers import trainer_pt_utils

    known = trainer_pt_utils.get_parameter_names
    if len(inspect.signature(known).parameters) == 2:

        def get_parameter_names(model: Any, types: Sequence[type], _patterns: Sequence[str] = ()) -> list[str]:
            return [name for name in known(model, types) if not any(word in name for word in _NO_DECAY)]

        trainer_pt_utils.get_parameter_names = get_parameter_names


def main() -> int:
    """Trace the grid of every family that this transformers has, and write its archive."""
    import torch
    import transformers

    _know_patterns()
    torch.set_num_threads(1)
    version = transformers.__version__
    (attn,) = sys.argv[1:]
    rows = []
    for family in FAMILIES:
        if family not in transformers.CONFIG_MAPPING or version.startswith(NOT_MODELLED.get(family, ("none",))):
            continue
        for options in grid(attn):
            found = trace_experts(values_of(family), **options)
            names = found.pop("parameters")
            if not any(row["family"] == family for row in rows):
                found["parameters"] = [each for each in names if ".1." not in each[0]]
            rows.append({"family": family, "options": options, "result": found})
    head = {"versions": {"transformers": version, "torch": torch.__version__}}
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    ARCHIVE.mkdir(parents=True, exist_ok=True)
    text = json.dumps(head)[:-1] + ', "rows": [\n' + lines + "\n]}\n"
    (ARCHIVE / f"{version}.json").write_text(text, encoding="utf-8")
    sys.stdout.write(f"{version}: {len(rows)} rows\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
