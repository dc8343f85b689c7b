"""Liger's truth: the library's own Python, traced as O1 traces a model, with kernels that do nothing.

Liger's kernels are Triton's and run on a GPU only, but what they read, write and are given is allocated by Python:
``triton`` is replaced by a stand-in whose kernels can be launched and do nothing, and the trace sees the rest. A CPU
takes other branches in two places of the fused loss (``_can_use_mm_out``, ``addmm``): those are tested by hand.

    python -m tests.oracles.liger        traces what the archive lacks; liger-kernel 0.8.5 must be importable
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.oracles import o1
from tests.oracles.families import CONFIGS, LORA_TARGETS

from memplan.introspect import trace

ARCHIVE = Path(__file__).parents[2] / "benchmarks" / "measurements" / "liger"
FAMILIES = (
    *("deepseek_v2", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mistral", "mixtral", "olmo2"),
    *("phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"),
)
ANSWERS = {"fused_linear_cross_entropy_forward": 100, "cross_entropy_forward": 1, "compute_routing_metadata": 8}
"""Functions of Liger that read a value, and what they are told: labels that count, labels in range, tiles."""


def grid(family: str) -> list[o1.Setup]:
    """Return one config's setups: precision x checkpointing, eager attention, and LoRA."""
    config = next(iter(CONFIGS[family]))
    attn = "eager" if family == "gemma2" else "sdpa"
    setups = []
    for precision in o1.PRECISIONS.values():
        base = {**precision, "attn": attn, "num_layers": 2, "micro_batch_size": 2, "seq_len": 100}
        setups += [o1.Setup(family, config, {**base, "gradient_checkpointing": flag}) for flag in (False, True)]
        targets = LORA_TARGETS.get(family, ["q_proj", "v_proj"])
        setups.append(o1.Setup(family, config, {**base, "lora": {"rank": 8, "targets": targets}}))
    if attn != "eager":
        setups.append(o1.Setup(family, config, {**setups[0].options, "attn": "eager"}))
    setups.append(o1.Setup(family, config, {**setups[0].options, "micro_batch_size": 1, "seq_len": 16}))
    return setups


class _Kernel:
    """A function under ``@triton.jit``: it can be launched on a grid."""

    def __init__(self, function: Any) -> None:
        self.__name__ = getattr(function, "__name__", "kernel")

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


class _ZeroingKernel(_Kernel):
    """One that leaves zeros in all it is given: what is in new memory may be no number, and then no step is taken."""

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            for x in (*args, *kwargs.values()):
                if hasattr(x, "untyped_storage") and x.is_floating_point():
                    x.data.zero_()

        return launch


class _Anything:
    """Whatever a kernel's source names: types, constants, decorators."""

    def __getattr__(self, name: str) -> Any:
        return _Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Anything()


def _module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__.update(members)
    made.__path__ = []  # type: ignore[attr-defined]
    return made


def stand_in_triton(*, zeroing: bool = False) -> None:
    """Put modules named ``triton...`` in place. torch looks for triton when it is imported, so it must be by then.

    Kernels do nothing, or are ``zeroing`` their tensors.
    """
    import torch._inductor  # noqa: F401
    import transformers  # noqa: F401

    kernel = _ZeroingKernel if zeroing else _Kernel

    def jit(function: Any = None, **options: Any) -> Any:
        return kernel if function is None else kernel(function)

    def anything(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    language = _module("triton.language", constexpr=lambda value: types.SimpleNamespace(value=value))
    names = ("math", "extra", "extra.libdevice", "extra.cuda", "extra.cuda.libdevice")
    inner = {f"triton.language.{name}": _module(f"triton.language.{name}") for name in names}
    for made in (language, *inner.values()):
        made.__getattr__ = anything  # type: ignore[method-assign]
    triton = _module(
        "triton",
        __version__="3.5.0",
        jit=jit,
        autotune=lambda *args, **kwargs: lambda function: function,
        heuristics=lambda *args, **kwargs: lambda function: function,
        Config=_Anything(),
        cdiv=lambda a, b: -(-a // b),
        next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
        language=language,
        runtime=_Anything(),
    )
    language.math = inner["triton.language.math"]  # type: ignore[attr-defined]
    language.extra = inner["triton.language.extra"]  # type: ignore[attr-defined]
    sys.modules.update({"triton": triton, "triton.language": language, "triton.runtime": _module("runtime"), **inner})


@contextmanager
def patched() -> Iterator[None]:
    """Trace models with Liger's kernels in them, each put into a module of transformers that nobody has patched."""
    import torch
    from liger_kernel.backends.dispatch import resolve_impl
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    resolve_impl("rope")  # imports, which must not happen among fake tensors
    build, equal, cross_entropy = trace._build_model, torch.equal, torch.nn.functional.cross_entropy
    clean: dict[types.ModuleType, dict[str, Any]] = {}

    def build_with_liger(*args: Any) -> Any:
        torch.nn.functional.cross_entropy = cross_entropy
        for module, names in clean.items():
            module.__dict__.update(names)
        model = build(*args)
        module = sys.modules[type(model).__module__]
        clean.setdefault(module, dict(module.__dict__))
        _apply_liger_kernel_to_instance(model=model)
        return model

    trace._VALUE_ANSWERS.update(ANSWERS)
    trace._build_model = build_with_liger
    torch.equal = lambda *args: False  # type: ignore[assignment]
    try:
        yield
    finally:
        trace._build_model, torch.equal, torch.nn.functional.cross_entropy = build, equal, cross_entropy


def main(arguments: Sequence[str] | None = None) -> int:
    """Trace families by name, or all."""
    stand_in_triton()
    with patched():
        for family in arguments or FAMILIES:
            archive = o1.run_grid(grid(family), ARCHIVE / f"{family}.json")
            refused = [row.unsupported for row in archive.rows if row.result is None]
            sys.stdout.write(f"{family}: {len(archive.rows)} rows, unsupported: {refused}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
