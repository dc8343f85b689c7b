"""Lengths of a dataset: what is computed is what the real samplers and collators do, drawn thousands of times."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memplan
from memplan import cli
from memplan.errors import SpecError
from memplan.lengths import Lengths, collated, read_lengths

RUN: dict[str, Any] = {
    "output_dir": "out",
    "bf16": True,
    "dtype": "float32",
    "optim": "adamw_torch",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": True,
}
MODEL, GPUS = "meta-llama/Llama-3.2-1B", "2xA100-40GB"


def drawn(lengths: list[int], batch: int, ranks: int, *, order: str = "random", drop_last: bool = False) -> list[Any]:
    """The batches of every rank in an epoch, as the Trainer's sampler and accelerate make them: [rank][batch][text]."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler
    from transformers.trainer_pt_utils import LengthGroupedSampler

    sampler: Any = {"random": RandomSampler, "sequential": SequentialSampler}.get(order, RandomSampler)(
        range(len(lengths))
    )
    if order == "group_by_length":
        sampler = LengthGroupedSampler(batch, lengths=lengths)
    batches: Any = BatchSampler(sampler, batch, drop_last)
    if ranks == 1:
        return [[[lengths[place] for place in each] for each in batches]]
    # Each rank has the same order, which its seed makes so.
    fixed = list(batches)

    class Fixed(BatchSampler):
        def __iter__(self) -> Any:
            return iter(fixed)

    shards = [BatchSamplerShard(Fixed(sampler, batch, drop_last), ranks, rank) for rank in range(ranks)]
    return [[[lengths[place] for place in each] for each in shard] for shard in shards]


def simulated(
    lengths: list[int], limit: int, batch: int, ranks: int, times: int = 2000, steps: int | None = None, **how: Any
) -> float:
    def dies() -> bool:
        of_ranks = drawn(lengths, batch, ranks, **how)
        return any(max(each) > limit for of_rank in of_ranks for each in of_rank[:steps])

    return sum(dies() for _ in range(times)) / times


TEXTS = [*range(1, 38), 90, 95, 100]


@pytest.mark.parametrize(
    ("batch", "ranks", "steps", "drop_last", "limit"),
    [(4, 1, 3, False, 80), (4, 1, None, False, 80), (3, 2, 2, False, 92), (3, 4, None, True, 92),
     (7, 1, None, True, 80), (3, 4, None, False, 99), (2, 3, 4, False, 97)],
)  # fmt: skip
def test_the_risk_is_what_real_samplers_come_to(
    batch: int, ranks: int, steps: int | None, drop_last: bool, limit: int
) -> None:
    times = 1500
    exact = Lengths.of(TEXTS).risk(limit, batch, ranks, steps=steps, drop_last=drop_last)
    found = simulated(TEXTS, limit, batch, ranks, times, steps, drop_last=drop_last)
    assert abs(exact - found) <= 4 * math.sqrt(max(exact * (1 - exact), 0.0) / times) + 1e-12


def test_the_risk_by_counting_every_order() -> None:
    texts = [1, 1, 2, 9, 9]
    orders = list(itertools.permutations(texts))
    for steps in range(1, 4):
        hit = sum(any(each > 5 for each in order[: 2 * steps]) for order in orders) / len(orders)
        assert Lengths.of(texts).risk(5, 2, steps=steps) == pytest.approx(hit, abs=1e-12)
    # The last batch, of one text, has room for a long one: then the other one is still in a whole batch.
    assert Lengths.of(texts).risk(5, 2, limit_of_last=9) == 1.0
    single = [1, 1, 2, 2, 9]
    orders = list(itertools.permutations(single))
    hit = sum(max(order[:4]) > 5 for order in orders) / len(orders)
    assert Lengths.of(single).risk(5, 2, limit_of_last=9) == pytest.approx(hit, abs=1e-12) == pytest.approx(0.8)


def test_orders_that_are_not_random() -> None:
    for _ in range(20):
        assert max(drawn(TEXTS, 4, 1, order="group_by_length")[0][0]) == 100
    lengths = Lengths.of(TEXTS)
    assert lengths.risk(80, 4, order="group_by_length", steps=1) == 1.0
    assert lengths.step_by_which(80, 4, order="group_by_length") == 1
    assert [lengths.risk(80, 4, order="sequential", steps=steps) for steps in (9, 10)] == [0.0, 1.0]
    assert [simulated(TEXTS, 80, 4, 1, 1, steps, order="sequential") for steps in (9, 10)] == [0.0, 1.0]
    assert lengths.step_by_which(80, 4, order="sequential") == 10


def test_the_longest_of_a_batch() -> None:
    found = Lengths.of([1, 2, 2, 5]).batch_longest(2)
    pairs = [max(pair) for pair in itertools.combinations([1, 2, 2, 5], 2)]
    assert found == pytest.approx({length: pairs.count(length) / len(pairs) for length in set(pairs)})
    assert sum(Lengths.of(TEXTS).batch_longest(8).values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("bad", "of", "seen"), [(1, 10**8, 10**6), (50_000, 10**8, 10**3), (20_000, 10**5, 7), (11_000, 10**8, 20_000)]
)
def test_large_numbers_are_exact(bad: int, of: int, seen: int) -> None:
    none = math.exp(math.fsum(math.log1p(-bad / (of - number)) for number in range(seen)))
    found = 1 - Lengths(((1, of - bad), (2, bad))).risk(1, 1, steps=seen)
    assert found == pytest.approx(none, rel=1e-6)


def test_the_step_by_which() -> None:
    lengths = Lengths.of(TEXTS)
    half = lengths.step_by_which(80, 2, 2)
    assert half is not None
    assert lengths.risk(80, 2, 2, steps=half) >= 0.5 > lengths.risk(80, 2, 2, steps=half - 1)
    assert lengths.step_by_which(100, 2, 2) is None


def test_padding_is_what_collators_do() -> None:
    import torch
    import transformers

    vocabulary = {"[PAD]": 0, "a": 1}
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="a")), pad_token="[PAD]", model_max_length=512
    )
    texts = [3, 17, 9, 30]
    for options in ({}, {"pad_to_multiple_of": 8}, {"padding": "max_length", "max_length": 40}):
        made = transformers.DataCollatorWithPadding(tokenizer, **options)(
            [{"input_ids": [1] * length} for length in texts]
        )
        assert isinstance(made["input_ids"], torch.Tensor)
        assert made["input_ids"].shape[1] == Lengths.of(texts).padded(**options).longest
    assert Lengths.of(texts).padded(16).counts == ((3, 1), (9, 1), (16, 2))


def test_what_lengths_may_be() -> None:
    import pandas as pd
    import torch

    same = Lengths.of([3, 1, 3])
    for given in (
        np.array([3, 1, 3]), np.array([3, 1, 3], dtype=np.uint16), torch.tensor([3, 1, 3]), (3, 1, 3), iter([3, 1, 3]),
        pd.Series([3, 1, 3]), {"text": ["x"], "length": [3, 1, 3]}, [[5, 6, 7], [5], [5, 6, 7]], [3.0, 1.0, 3.0],
    ):  # fmt: skip
        assert Lengths.of(given) == same
    assert (same.texts, same.tokens, same.median(), same.longest, same.beyond(1)) == (3, 7, 3, 3, 2)


@pytest.mark.parametrize(
    "given", [[], "abc", 5, None, [-1], [1.5], [True], ["3"], [10**400], [float("nan")], [None], {"a": [1], "b": [2]}]
)
def test_what_is_no_length(given: Any) -> None:
    with pytest.raises(SpecError, match="lengths"):
        Lengths.of(given)


@pytest.mark.parametrize(
    "options", [{"max_length": 0}, {"pad_to_multiple_of": -8}, {"padding": "x"}, {"padding": "max_length"}]
)
def test_what_is_no_padding(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        Lengths.of([3]).padded(**options)


# -- files -------------------------------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("3\n1\n\n3\n")
    (tmp_path / "a.json").write_text("[3, 1, 3]")
    (tmp_path / "b.json").write_text('{"name": "x", "length": [3, 1, 3]}')
    (tmp_path / "a.csv").write_text("text,length\na,3\nb,1\nc,3\n")
    (tmp_path / "b.csv").write_text("3\n1\n3\n")
    np.save(tmp_path / "a.npy", np.array([3, 1, 3]))
    for name in ("a.txt", "a.json", "b.json", "a.csv", "b.csv", "a.npy"):
        assert read_lengths(tmp_path / name).counts == ((1, 1), (3, 2)), name
    assert read_lengths(str(tmp_path / "a.npy")) == read_lengths([3, 1, 3])


def test_a_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        SpecError, match=r"a\.parquet: (are in a \.parquet, for which pyarrow is missing|cannot be read)"
    ):
        read_lengths(tmp_path / "a.parquet")


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "run")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([Evil(tmp_path / "done")], dtype=object), allow_pickle=True)
    with pytest.raises(SpecError, match=r"evil\.npy: are of type object, which are no numbers"):
        read_lengths(tmp_path / "evil.npy")
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"3\nx\n"), ("a.txt", b""), ("a.txt", b"\xff\xfe"), ("a.txt", b"9" * 5000), ("a.json", b"{"),
        ("a.json", b'{"a": [1], "b": [2]}'), ("a.json", b"[" * 10**5), ("a.json", b"[1e400]"), ("a.csv", b""),
        ("a.csv", b"a,b\n1,2\n"), ("a.csv", b"x,length\n1\n"), ("a.npy", b"\x93NUMPY"), ("a.npy", b"[3]"),
        ("a.csv", b'length\n"' + b"x" * 200_000),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError) as raised:
        read_lengths(tmp_path / name)
    assert name in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("path", ["/dev/zero", "/", "missing.txt", "a\0b", "/dev/stdin"])
def test_what_is_no_file(path: str) -> None:
    with pytest.raises(SpecError, match="is not a file that can be read"):
        read_lengths(path)


# -- a run -------------------------------------------------------------------------------------------------------------


def texts(longest: int = 4096) -> list[int]:
    rng = random.Random(7)
    return [*(min(1000, int(rng.lognormvariate(5.5, 0.6)) + 1) for _ in range(4000)), *[longest] * 3]


def the_finding(found: memplan.Check) -> memplan.Finding:
    (finding,) = [each for each in found.findings if each.code == "longest-batch"]
    assert "padding" not in {each.code for each in found.findings}
    return finding


def test_the_longest_batch_is_estimated_and_the_risk_named() -> None:
    found = memplan.check(RUN, MODEL, cluster=GPUS, lengths=texts())
    assert found.estimate.setup["seq_len"] == 4096
    assert not found.estimate.setup["packed"]
    assert found.verdict == "does-not-fit"
    finding = the_finding(found)
    assert finding.severity == "warning"
    assert finding.message.startswith("3 of 4,003 texts are longer than the ")
    assert "within an epoch a batch has one with a probability of 100%, by step 13 with one of 50%" in finding.message
    limit = Lengths.of(texts()).step_by_which(1000, 4, 2)
    assert limit is not None
    assert -(-limit // 8) == 13
    few = memplan.check({**RUN, "max_steps": 5}, MODEL, cluster=GPUS, lengths=texts())
    risk = Lengths.of(texts()).risk(1000, 4, 2, steps=40)
    assert f"within 5 steps a batch has one with a probability of {risk:.1%}" in the_finding(few).message
    grouped = memplan.check({**RUN, "train_sampling_strategy": "group_by_length"}, MODEL, cluster=GPUS, lengths=texts())
    assert "by step 1 with one of 50%" in the_finding(grouped).message
    other = memplan.check({**RUN, "train_sampling_strategy": "batch_rebalance"}, MODEL, cluster=GPUS, lengths=texts())
    assert "is not modelled" in the_finding(other).message


def test_texts_that_are_cut_fit() -> None:
    found = memplan.check({**RUN, "max_length": 1024}, MODEL, cluster=GPUS, lengths=texts())
    assert (found.verdict, found.estimate.setup["seq_len"]) == ("fits", 1024)
    assert the_finding(found).severity == "info"
    assert "of 1,024 tokens in length, of 4,096 before they are cut" in the_finding(found).message
    multiple = memplan.check({**RUN, "pad_to_multiple_of": 64}, MODEL, cluster=GPUS, lengths=[100, 130])
    assert multiple.estimate.setup["seq_len"] == 192
    padded = memplan.check({**RUN, "pad_to_max_length": True, "max_length": 512}, MODEL, cluster=GPUS, lengths=[100])
    assert padded.estimate.setup["seq_len"] == 512


def test_packed_sequences_are_full() -> None:
    found = memplan.check({**RUN, "packing": True, "max_length": 512}, MODEL, cluster=GPUS, lengths=texts())
    assert found.estimate.setup["seq_len"] == 512
    assert "longest-batch" not in {each.code for each in found.findings}


def test_no_text_is_short_enough() -> None:
    found = memplan.check({**RUN, "per_device_train_batch_size": 512}, MODEL, cluster="1xA100-40GB", lengths=texts())
    assert the_finding(found).message.startswith("Not even the shortest of 4,003 texts fits for certain in batches")


def test_a_script_gives_its_lengths() -> None:
    with pytest.raises(memplan.PreflightError) as raised:
        memplan.preflight(MODEL, RUN, cluster=GPUS, lengths=np.array(texts()))
    codes = {each.code for each in raised.value.findings}
    assert {"does-not-fit", "longest-batch"} <= codes
    assert "seq-len-unknown" not in codes
    size = memplan.largest_batch(MODEL, RUN, cluster=GPUS, lengths=texts())
    shorter = memplan.largest_batch(MODEL, RUN, cluster=GPUS, lengths=texts(1000))
    assert 1 <= size < shorter


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "lengths.npy", np.array(texts()))
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    words = ["--gpu", "A100-40GB", "--gpus", "2", "--lengths", str(tmp_path / "lengths.npy")]
    assert cli.main(["check", str(tmp_path / "run.json"), "--model", MODEL, *words]) == 1
    assert "3 of 4,003 texts are longer than the" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["estimate", MODEL, *words, "--strategy", "ddp", "--json"]) in (0, 1, 3)
    setup = json.loads(capsys.readouterr().out)["setup"]
    assert (setup["seq_len"], setup["packed"]) == (4096, False)
    assert cli.main(["estimate", MODEL, *words, "--strategy", "ddp", "--seq-len", "512", "--json"]) in (0, 1, 3)
    assert json.loads(capsys.readouterr().out)["setup"]["seq_len"] == 512
    assert cli.main(["estimate", MODEL, "--lengths", "missing.npy"]) == 2
    assert capsys.readouterr().err.startswith("--lengths: 'missing.npy' is not a file")


def test_arguments_of_older_versions() -> None:
    assert collated(Lengths.of([3]), {"group_by_length": True}, None).order == "group_by_length"
    assert collated(Lengths.of([3]), {"max_steps": -1, "dataloader_drop_last": True}, None).max_steps is None


# -- what nobody should give -------------------------------------------------------------------------------------------


def header(descr: str, shape: str) -> bytes:
    """A .npy that claims to have an array."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04" + b"\0" * 100, "cannot be read"),
        (header("'<i8'", "(10000000000000,)"), "more than 16777216 texts"),
        (header("'<i8'", f"({10**30},)"), "more than 16777216 texts"),
        (header("'<i8'", "(1000,)"), "are 1000 by the file's header, and fewer in it"),
        (header("'<i8'", "(-1,)"), "are -1 by the file's header"),
        (header("'|V0'", "(1000000000,)"), "are of type"),
        (header("[('a', '<i8'), ('b', '<i8')]", "(1,)") + b"\0" * 16, "are of type"),
        (header("'|O'", "(1,)"), "are of type object"),
        (header("'<i8'", "(2, 2)") + b"\0" * 32, "have 2 dimensions"),
        (header("'<i8'", "()") + b"\0" * 8, "have 0 dimensions"),
        (header("'|i1'", "(20000000,)") + b"\1" * 20_000_000, "more than 16777216 texts"),
        (header("(", "(1,)"), "file"),
        (header("'<f8'", "(1,)") + b"\0\0\0\0\0\0\xf8\x7f", "nan is not a number of tokens"),
    ],
)
def test_an_array_of_a_file_is_what_its_header_says(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(SpecError, match=message):
        read_lengths(path)
    assert time.process_time() - start < 2


def test_as_many_texts_as_are_taken_take_seconds(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(2**24, dtype=np.int32) % 4096)
    start = time.process_time()
    found = read_lengths(tmp_path / "a.npy").padded(1024)
    assert time.process_time() - start < 20
    assert (found.texts, found.longest) == (2**24, 1024)
    (tmp_path / "a.json").write_text("[" + "[]," * 12_000_000 + "[]]")
    with pytest.raises(SpecError, match="bytes of JSON"):
        read_lengths(tmp_path / "a.json")


@pytest.mark.parametrize(
    "given",
    [
        list(np.array([3, 1, 3])),
        [np.array(3), np.array(1), np.array(3)],
        [torch.tensor(3), torch.tensor(1), torch.tensor(3)],
        torch.tensor([3, 1, 3]),
        [np.zeros(3), np.zeros(1), np.zeros(3)],
        (np.int8(each) for each in (3, 1, 3)),
    ],
)
def test_numbers_of_any_library_are_lengths(given: Any) -> None:
    assert Lengths.of(given).counts == ((1, 1), (3, 2))


@pytest.mark.parametrize(
    "given", [np.array(5), torch.tensor(5), list, [torch.tensor(5.5)], [np.array(True)], [object()], range(2**24 + 1)]
)
def test_what_only_looks_like_lengths(given: Any) -> None:
    with pytest.raises(SpecError, match=r"^lengths: "):
        Lengths.of(given)
    with pytest.raises(SpecError):
        memplan.check({**RUN, "model_name_or_path": MODEL}, cluster=GPUS, lengths=given)


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda lengths: lengths.risk(4, 0), "micro_batch_size"),
        (lambda lengths: lengths.risk(4, 1, 0), "ranks"),
        (lambda lengths: lengths.risk(None, 1), "limit"),
        (lambda lengths: lengths.risk("a", 1), "limit"),
        (lambda lengths: lengths.risk(4, 1, steps=-1), "steps"),
        (lambda lengths: lengths.risk(4, 1, order="x"), "order"),
        (lambda lengths: lengths.step_by_which(4, 0), "micro_batch_size"),
        (lambda lengths: lengths.step_by_which(4, -1), "micro_batch_size"),
        (lambda lengths: lengths.step_by_which(4, 1, risk=2), "risk"),
        (lambda lengths: lengths.step_by_which(4, 1, order="x"), "order"),
        (lambda lengths: lengths.batch_longest(0), "micro_batch_size"),
        (lambda lengths: lengths.batch_longest(-1), "micro_batch_size"),
        (lambda lengths: lengths.seen(True), "micro_batch_size"),
        (lambda lengths: lengths.beyond(1.5), "limit"),
    ],
)
def test_what_is_asked_of_lengths_is_checked(ask: Any, field: str) -> None:
    with pytest.raises(SpecError, match=f"^{field}: "):
        ask(Lengths.of([3, 1, 3]))
