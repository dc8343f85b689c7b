import sys

import pytest

from memplan.errors import SpecError
from memplan.specs import Strategy, ZeroSpec

LEGAL = [
    ("single", "none", "none"),
    ("ddp", "none", "none"),
    ("zero0", "none", "none"),
    ("zero1", "cpu", "none"),
    ("zero2", "cpu", "none"),
    ("zero3", "cpu", "none"),
    ("zero3", "nvme", "none"),
    ("zero3", "cpu", "cpu"),
    ("zero3", "nvme", "nvme"),
    ("fsdp", "none", "none"),
    ("fsdp", "none", "cpu"),
]
KINDS = ["single", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp"]
OFFLOADS = ["none", "cpu", "nvme"]


@pytest.mark.parametrize(("kind", "optimizer", "param"), LEGAL)
def test_legal(kind: str, optimizer: str, param: str) -> None:
    strategy = Strategy(kind=kind, offload_optimizer=optimizer, offload_param=param)
    assert Strategy.from_json(strategy.to_json()) == strategy


@pytest.mark.parametrize(
    ("kind", "optimizer", "param"),
    [
        (kind, optimizer, param)
        for kind in KINDS
        for optimizer in OFFLOADS
        for param in OFFLOADS
        if kind != "zero3"
        and (kind, optimizer, param) not in [*LEGAL, ("zero1", "none", "none"), ("zero2", "none", "none")]
    ],
)
def test_illegal(kind: str, optimizer: str, param: str) -> None:
    with pytest.raises(SpecError, match=rf"^offload_(optimizer|param): '(cpu|nvme)' cannot go with {kind}\. Use "):
        Strategy(kind=kind, offload_optimizer=optimizer, offload_param=param)


def test_stage_and_engine() -> None:
    assert Strategy(kind="zero2").zero_stage == 2
    assert Strategy(kind="zero0").is_deepspeed
    assert Strategy(kind="fsdp").zero_stage is None
    assert not Strategy(kind="ddp").is_deepspeed


def test_counts_are_read_as_deepspeed_files_write_them() -> None:
    zero = ZeroSpec(reduce_bucket_size=5e8, stage3_prefetch_bucket_size="auto", sub_group_size=10**9)
    assert zero.reduce_bucket_size == 500_000_000
    assert zero.stage3_prefetch_bucket_size == "auto"
    assert zero.stage3_model_persistence_threshold == sys.maxsize
    assert ZeroSpec.from_json(zero.to_json()) == zero


@pytest.mark.parametrize("bad", [-1, 1.5, float("nan"), float("inf"), 1e30, True, "many", None])
def test_counts_refuse(bad) -> None:
    with pytest.raises(SpecError, match=r"^zero\.reduce_bucket_size: .* is not an integer in range"):
        Strategy(kind="zero2", zero={"reduce_bucket_size": bad})


def test_nested_keys_are_named_by_their_path() -> None:
    with pytest.raises(SpecError, match=r"^zero\.offload_optimizer\.buffer_count: 2 is too few\. Use 4 or more"):
        Strategy(kind="zero3", zero={"offload_optimizer": {"buffer_count": 2}})
    with pytest.raises(SpecError, match=r"^zero\.reduce_bucket: 1 is given .* Did you mean reduce_bucket_size"):
        Strategy(kind="zero3", zero={"reduce_bucket": 1})


@pytest.mark.parametrize("kind", ["zero1", "zero2"])
def test_a_ratio_of_offloading_is_stage_3s(kind: str) -> None:
    with pytest.raises(SpecError, match=rf"ratio: 0.5 is refused by DeepSpeed with {kind}"):
        Strategy(kind=kind, offload_optimizer="cpu", zero=ZeroSpec(offload_optimizer={"ratio": 0.5}))
