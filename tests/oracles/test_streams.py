"""What a play has on which stream, beside where the real DeepSpeed and FSDP allocate (streams.py)."""

import json
from collections import Counter

import pytest
from tests.oracles import o2, streams
from tests.oracles.families import CONFIGS
from tests.oracles.test_engines import played
from tests.oracles.test_traffic import label

from memplan.engines import fsdp, fsdp1, zero, zero3
from memplan.memory.play import PlayLedger

ROWS = json.loads(streams.ARCHIVE.read_text())["rows"]
NAMES = {
    "zero1": {1: zero.REDUCTION},
    "zero2": {1: zero.REDUCTION},
    "zero3": {1: zero3.ALL_GATHER, 2: zero3.REDUCE_AND_PARTITION},
    "fsdp": {1: fsdp.COPY_IN, 3: fsdp.REDUCE_SCATTER, 4: fsdp.ALL_REDUCE},
    "fsdp1": {1: fsdp1.UNSHARD, 2: fsdp1.POST_BACKWARD, 3: fsdp1.PRE_UNSHARD},
}
"""The library's streams in the order in which they are made, and what they are called here."""
LLAMA = next(iter(CONFIGS["llama"]))


def engine(row: dict) -> str:
    kind: str = row["options"]["strategy"]
    return "fsdp1" if row["options"].get("fsdp", {}).get("version") == 1 else kind


def estimated(row: dict) -> dict[int, Counter[int]]:
    """By stream how many blocks of each size are allocated in the second step."""
    ledger = PlayLedger(ranks=row["options"]["gpus"])
    played(o2.Row(o2.Setup("llama", LLAMA, row["options"])), ledger)
    found: dict[int, Counter[int]] = {}
    for number in (entry for entry in ledger.log[ledger.passes[2].start :] if entry >= 0):
        stream, nbytes = ledger.streams.get(number, 0), ledger.requested[number]
        # SplitWithSizesBackward0's, which a CPU runs elsewhere.
        splits = engine(row) == "fsdp1" and stream == fsdp1.UNSHARD and ledger.components[number] == "gradients"
        if stream and nbytes > streams.SMALL and not splits:
            found.setdefault(stream, Counter())[rounded(nbytes)] += 1
    return found


def rounded(nbytes: int) -> int:
    """Norms are too small to say in which unit they are."""
    return -(-nbytes // streams.SMALL) * streams.SMALL


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{label(row)}-{'-'.join(row['options'].get('fsdp', ()))}")
def test_blocks_are_on_the_streams_on_which_the_library_allocates_them(row: dict) -> None:
    names = NAMES[engine(row)]
    measured: dict[int, Counter[int]] = {names[int(number)]: Counter() for number in row["streams"]}
    for number, sizes in row["streams"].items():
        for size, count in sizes.items():
            measured[names[int(number)]][rounded(int(size))] += count
    assert estimated(row) == measured


def test_there_are_rows_of_every_engine_and_stream() -> None:
    seen = {(engine(row), int(number)) for row in ROWS for number in row["streams"]}
    assert seen == {(kind, number) for kind, names in NAMES.items() for number in names}
