"""What an engine moves in a step, beside the collectives that the real DeepSpeed and FSDP2 call (traffic.py)."""

import json

import pytest
from tests.oracles import o2, traffic
from tests.oracles.families import CONFIGS
from tests.oracles.test_engines import played

ROWS = json.loads(traffic.ARCHIVE.read_text())["rows"]
NAMES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "to_gpu": "to_gpu",
    "to_host": "to_host",
    "nvme_read": "nvme_read",
    "nvme_write": "nvme_write",
}
LLAMA = next(iter(CONFIGS["llama"]))


def label(row: dict) -> str:
    kind, accumulated = row["options"]["strategy"], row["options"].get("grad_accum_steps", 1)
    names = ("lora", "gradient_checkpointing", "zero", "fsdp", "offload_optimizer", "offload_param")
    return "-".join([kind, str(accumulated), *(name for name in names if name in row["options"])])


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_collectives_carry_what_the_engine_says(row: dict) -> None:
    ledger = played(o2.Row(o2.Setup("llama", LLAMA, row["options"])))
    estimated = {kind: sum(moves[kind] for moves in ledger.moves_of_step) for kind in NAMES.values()}
    measured = {NAMES[name]: nbytes for name, nbytes in row["bytes"].items()}
    # Small ones are not counted there: a single norm's weight of ZeRO-3, or the rest of a bucket.
    for kind, nbytes in estimated.items():
        assert nbytes == pytest.approx(measured.get(kind, 0), abs=8 * traffic.SMALL, rel=0.001), kind


def test_there_are_rows_of_every_engine() -> None:
    assert {row["options"]["strategy"] for row in ROWS} == {"zero1", "zero2", "zero3", "fsdp"}
    assert all(sum(row["bytes"].values()) > traffic.SMALL for row in ROWS)
