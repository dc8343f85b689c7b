"""What CUDA's fused attention kernels take from the allocator besides their results, in elements of float32.

Sources: aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, attention.cu, attention_backward.cu, and
mem_eff_attention/{kernel_forward,kernel_backward}.h with kernels/cutlassB.h, torch 2.13.
"""

from __future__ import annotations

from typing import NamedTuple

from memplan.tape.dispatch import DeviceRules


def up(n: int, step: int) -> int:
    """N rounded up to a multiple of ``step``."""
    return -(-n // step) * step


# -- flash ---------------------------------------------------------------------------------------------------------


def flash_splits(multiprocessors: int, blocks: int, sk: int, head_dim: int) -> int:
    """Over how many thread blocks the forward spreads the keys of one block of queries (num_splits_heuristic).

    ``blocks`` is batch x heads x blocks of 64 queries: where that nearly fills the GPU there is one split; otherwise
    the fewest of those that come within 85 % of the best use of its multiprocessors, of which each runs two blocks.
    """
    slots = 2 * multiprocessors
    if blocks >= 0.8 * slots:
        return 1
    key_blocks = -(-sk // (256 if head_dim <= 64 else 128 if head_dim <= 128 else 64))
    efficiencies: dict[int, float] = {}
    for splits in range(1, min(128, slots, key_blocks) + 1):
        if splits == 1 or -(-key_blocks // splits) != -(-key_blocks // (splits - 1)):
            waves = blocks * splits / slots
            efficiencies[splits] = waves / -(-blocks * splits // slots)
    best = max(efficiencies.values())
    return next(splits for splits, efficiency in efficiencies.items() if efficiency >= 0.85 * best)


def flash_head_dim(head_dim: int) -> int:
    """The head size that flash's float32 accumulators have."""
    return up(head_dim, 32 if head_dim <= 128 else 64)


# -- memory-efficient ----------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A backward kernel: queries and keys of one tile, and whether gradients of keys and values fit in registers."""

    queries: int
    keys: int
    in_registers: bool


def backward_tile(rules: DeviceRules, half: bool, head_dim: int, dropout: float) -> Tile:
    """The first kernel of cutlassB.h that takes ``head_dim`` (the larger of the two) and finds room.

    Those with 128 queries need more shared memory than compute capability 7.5, 8.6, 8.9 and 12.x have, but for the
    one that was made for 8.6 and 8.9.
    """
    cc = rules.compute_capability
    if head_dim <= 64:
        return Tile(64, 64, half)
    if half and cc in ((8, 6), (8, 9)) and head_dim <= 96 and not dropout:
        return Tile(128, 64, True)
    roomy = cc in ((7, 0), (7, 2), (8, 0), (8, 7)) or cc[0] in (9, 10)
    if not roomy or (not half and cc < (8, 0)):
        return Tile(64, 64, False)
    if not half or head_dim > 128:
        return Tile(128, 64, False)
    return Tile(128, 128 if cc >= (8, 0) else 64, True)


def efficient_workspace(
    rules: DeviceRules, half: bool, batch: int, heads: int, sq: int, sk: int, dim: int, dim_v: int, dropout: float
) -> int:
    """The backward's workspace: a tile and a lock for each tile of the gradient of the queries, and what gradients of
    keys and values need that are not kept in registers. float32 results are their own accumulators.
    """
    cc = rules.compute_capability
    tile = backward_tile(rules, half, max(dim, dim_v), dropout)
    grad_q = grad_kv = 0
    if half or cc >= (7, 0):
        grad_q = -(-sq // tile.queries) * -(-dim // tile.keys) * (tile.queries * tile.keys + 4)
    if half and not tile.in_registers:
        splits = max(1, min(-(-sk // tile.keys), 200 // (batch * heads))) if cc >= (7, 0) else 1
        if batch * heads >= 256 and sk <= 2 * tile.keys:
            splits = 1
        grad_kv = splits * tile.keys * (up(dim, tile.queries) + up(dim_v, tile.queries))
    return batch * heads * up(grad_kv + grad_q, 4)


def computes_delta(rules: DeviceRules, half: bool, tile: Tile) -> bool:
    """Whether the backward kernel sums gradient times result itself."""
    return half and (tile.in_registers or not (7, 0) <= rules.compute_capability < (7, 5))


def accumulates_output(half: bool, dim: int, dim_v: int) -> bool:
    """Whether the forward needs a float32 copy of its result: heads too wide for the registers."""
    return half and max(dim, dim_v) > 128
