"""Optimizers: what each keeps per parameter, and what one step allocates and gives back.

Sources: torch/optim/*.py (2.13), bitsandbytes/optim/optimizer.py, transformers/optimization.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from memplan.errors import UnsupportedError
from memplan.tape.dispatch import DeviceRules
from memplan.tape.tensor import Parameter

Counted = Sequence[tuple[Parameter, int]]
"""Trainable parameters, each with how many of the model it stands for."""

SCALAR = 512
"""Bytes that a scalar tensor takes: the allocator's smallest block."""


def rounded(nbytes: int) -> int:
    """The block that the caching allocator gives for a request: a multiple of 512 (kMinBlockSize)."""
    return (nbytes + 511) & -512


def state_bytes(optim: str, p: Parameter, rules: DeviceRules) -> tuple[int, ...]:
    """Bytes of each tensor that the optimizer keeps on the device for one parameter, in the order it makes them."""
    if optim in ("adamw_torch", "adamw_torch_fused", "adamw_torch_foreach", "adamw_torch_loop"):
        n = rounded(p.nbytes)
        # The step count is a tensor on the device for fused, on the host for the others.
        on_device = optim == "adamw_torch_fused" or rules.kind == "cpu"
        return (SCALAR, n, n) if on_device else (n, n)
    if optim == "sgd":
        return ()
    raise UnsupportedError(f"optim: {optim!r} has no rule yet. Use adamw_torch_fused.")


def step_temporaries(optim: str, parameters: Counted, rules: DeviceRules) -> list[tuple[int, int]]:
    """What is alive at the fullest moment of a step beyond weights, gradients and states: (bytes, how many)."""
    if optim == "adamw_torch_foreach" or (optim == "adamw_torch" and rules.kind != "cpu"):
        return [(rounded(p.nbytes), count) for p, count in parameters]
    if optim in ("adamw_torch", "adamw_torch_loop"):
        return [(max((rounded(p.nbytes) for p, _ in parameters), default=0), 2)]
    return []
