"""Partitions of flat buffers."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oracles.families import CONFIGS

import memplan
from memplan.engines.zero import Group, Weight, _batches, fullest_ranks
from memplan.errors import SpecError
from memplan.specs.strategy import ZeroSpec


def groups(ranks: int, *sizes: list[int]) -> list[Group]:
    return [Group([Weight((i, at), n) for at, n in enumerate(each)], ranks) for i, each in enumerate(sizes)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
@pytest.mark.parametrize(
    "sizes", [([5],), ([1, 1, 1000, 3], [7, 2]), ([300, 1, 299], [1, 500, 1]), ([64] * 9, [1] * 5)], ids=str
)
def test_the_fullest_rank_is_the_first_that_touches_most(sizes: tuple[list[int], ...], ranks: int) -> None:
    made = groups(ranks, *sizes)
    touched = [sum(w.elements for group in made for w, _ in group.in_partition(rank)) for rank in range(ranks)]
    assert fullest_ranks(made) == sorted({0, ranks - 1, touched.index(max(touched))})


def test_it_is_found_without_looking_at_each_rank() -> None:
    assert fullest_ranks(groups(10**9, [10**10, 5], [10**9])) == [0, 10**9 - 1]


def test_a_batch_ends_with_the_piece_that_takes_it_above_the_limit() -> None:
    assert _batches([(0, 3), (1, 3), (2, 1), (3, 9), (4, 2)], 6) == [[(0, 3), (1, 3), (2, 1)], [(3, 9)], [(4, 2)]]
    assert len(_batches([(rank, 1) for rank in range(200_000)], 10**6)) == 1  # in the time of one pass


def test_torchs_muon_cannot_step_on_flat_partitions() -> None:
    """What a ZeRO optimizer does: the flat partition takes the place of the group's parameters."""
    import torch

    optimizer = torch.optim.Muon([torch.nn.Parameter(torch.zeros(4, 4))])
    flat = torch.nn.Parameter(torch.zeros(16))
    flat.grad = torch.zeros(16)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match="Param gradient must be a 2D matrix"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_nor_is_it_estimated(kind: Any) -> None:
    training, strategy = memplan.TrainingSpec(optim="muon"), memplan.Strategy(kind=kind)
    with pytest.raises(memplan.SpecError, match=f"optim: 'muon' needs matrices, and {kind} steps on flat partitions"):
        memplan.estimate(dict(CONFIGS["llama"]["small"]), training, "2xA100-80GB", strategy)


def test_masters_in_bfloat16_need_a_stage() -> None:
    """_do_sanity_check of DeepSpeedConfig: "only supported with ZeRO Stage 1, 2, or 3"."""
    keys = ZeroSpec(bf16_master_weights_and_grads=True, bf16_optimizer_states=True)
    with pytest.raises(SpecError, match="bf16_master_weights_and_grads: true is refused by DeepSpeed at stage 0"):
        memplan.estimate("gpt2", {"seq_len": 8}, "2xA100-80GB", memplan.Strategy(kind="zero0", zero=keys))
