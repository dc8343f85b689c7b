"""Lengths of a dataset's texts: the longest batch under a collator, and how likely a batch is that does not fit.

The Trainer draws each epoch's order without replacement and cuts it into batches, which accelerate deals out to the
ranks in turn. So what a run has seen after some steps is a random sample of the texts, and a text that is longer than
what fits is among them with a hypergeometric probability: nothing is simulated. Sources: transformers 5.23
``trainer.py`` (``_get_train_sampler``), ``trainer_pt_utils.py`` (``get_length_grouped_indices``),
``data/data_collator.py``; accelerate 1.15 ``data_loader.py`` (``BatchSamplerShard``).
"""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, islice
from operator import index
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from memplan.errors import SpecError, short

__all__ = ["Batches", "Lengths", "Order", "Padding", "collated", "read_lengths"]

Padding: TypeAlias = Literal["longest", "max_length"]
"""``padding`` of a collator: to the longest text of a batch, or all to ``max_length``."""
Order: TypeAlias = Literal["random", "sequential", "group_by_length"]
"""``train_sampling_strategy`` of TrainingArguments, as far as it is modelled."""
MOST_TEXTS = 2**24
"""Sixteen million, each of which Python holds as a number."""
LARGEST_FILE = 8 * MOST_TEXTS
"""Bytes."""
LARGEST_JSON = 2**25
"""Bytes: an empty list of three letters takes twenty times as many to hold."""
LONGEST_TEXT = 2**31
"""Tokens."""
_NAMES = ("length", "lengths", "num_tokens", "n_tokens", "seq_len", "input_ids")
"""Columns that are looked for, the first that is there."""


@dataclass(frozen=True)
class Lengths:
    """How many texts of each length a dataset has, in tokens."""

    counts: tuple[tuple[int, int], ...]
    """(tokens, texts), the shortest first."""
    first: tuple[int, ...] = ()
    """Lengths in their order, where it counts (``order="sequential"``)."""

    @classmethod
    def of(cls, lengths: Iterable[Any]) -> Lengths:
        """Count lengths: a list, an array, a column of ``datasets``; of texts that are tokenized, how long they are.

        Raises SpecError for none at all, and for what is no length.

        >>> Lengths.of([3, 1, 3]).counts
        ((1, 1), (3, 2))
        """
        if isinstance(lengths, Mapping):
            lengths = _column(lengths)
        ordered = tuple(map(_length, islice(_items(lengths), MOST_TEXTS + 1)))
        if not ordered:
            raise SpecError("lengths: are none. Give the number of tokens of each text.")
        _refuse_many(len(ordered))
        return cls(tuple(sorted(Counter(ordered).items())), ordered)

    @property
    def texts(self) -> int:
        """How many there are."""
        return sum(count for _, count in self.counts)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return self.counts[-1][0]

    @property
    def tokens(self) -> int:
        """Of all texts together."""
        return sum(length * count for length, count in self.counts)

    def median(self) -> int:
        """Tokens of the text in the middle, the lower of two."""
        seen = accumulate(count for _, count in self.counts)
        return next(length for (length, _), below in zip(self.counts, seen) if 2 * below >= self.texts)

    def beyond(self, limit: int) -> int:
        """How many texts have more than ``limit`` tokens. Raises SpecError."""
        limit = _whole("limit", limit, None)
        return sum(count for length, count in self.counts if length > limit)

    def padded(
        self, max_length: int | None = None, padding: Padding = "longest", pad_to_multiple_of: int | None = None
    ) -> Lengths:
        """Return the lengths as a collator makes them: cut at ``max_length``, and padded up to a multiple.

        With ``padding="max_length"`` every text has that many tokens, which has to be given. Raises SpecError.
        """
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SpecError.at(name, value, "is not a positive integer", "Use 1 or more.")
        if padding not in get_args(Padding):
            raise SpecError.at("padding", padding, "is not known", f"Use {' or '.join(get_args(Padding))}.")
        if padding == "max_length" and max_length is None:
            raise SpecError("max_length: missing: padding is to it. Say how many tokens it is.")
        step = pad_to_multiple_of or 1

        def length(tokens: int) -> int:
            cut = tokens if max_length is None else max_length if padding == "max_length" else min(tokens, max_length)
            return -(-cut // step) * step

        made = {tokens: length(tokens) for tokens, _ in self.counts}
        found: Counter[int] = Counter()
        for tokens, count in self.counts:
            found[made[tokens]] += count
        return Lengths(tuple(sorted(found.items())), tuple(map(made.__getitem__, self.first)))

    def batch_longest(self, micro_batch_size: int) -> dict[int, float]:
        """Return the distribution of the longest text of a random batch: tokens -> probability.

        Of ``n`` texts of which ``k`` have at most ``t`` tokens, a batch of ``b`` has no longer one with probability
        C(k, b) / C(n, b). Raises SpecError.
        """
        size = min(_whole("micro_batch_size", micro_batch_size), self.texts)
        found: dict[int, float] = {}
        below, before = 0, 0.0
        for length, count in self.counts:
            below += count
            here = _all_within(below, self.texts, size)
            if here > before:
                found[length] = here - before
            before = here
        return found

    def risk(
        self,
        limit: int,
        micro_batch_size: int,
        ranks: int = 1,
        *,
        steps: int | None = None,
        order: Order = "random",
        drop_last: bool = False,
        limit_of_last: int | None = None,
    ) -> float:
        """Return the probability that a batch of an epoch, on any rank, has a text of more than ``limit`` tokens.

        Args:
            limit: tokens of the longest text that fits.
            micro_batch_size: sequences of a batch on one rank.
            ranks: data-parallel ranks, to which batches are dealt out in turn.
            steps: forwards of each rank, if they are fewer than the epoch has; a step of the optimizer has as many as
                ``gradient_accumulation_steps``.
            order: how texts are drawn.
            drop_last: ``dataloader_drop_last``: what makes up no whole round of batches is left out.
            limit_of_last: the same as ``limit`` for the last batch of one rank, which is smaller; None is ``limit``.
                Several ranks fill it up with texts from the beginning.

        Raises SpecError.
        """
        if order not in get_args(Order):
            raise SpecError.at("order", order, "is not known", f"Use {' or '.join(get_args(Order))}.")
        limit = _whole("limit", limit, None)
        limit_of_last = None if limit_of_last is None else _whole("limit_of_last", limit_of_last, None)
        seen = self.seen(micro_batch_size, ranks, steps=steps, drop_last=drop_last)
        if order == "sequential":
            return float(any(length > limit for length in self.first[:seen]))
        long = self.beyond(limit)
        if order == "group_by_length":  # the batch with the longest text of all is the first
            return float(long > 0 and seen > 0)
        risk = 1.0 - _all_within(self.texts - long, self.texts, seen)
        rest = self.texts % micro_batch_size
        if ranks > 1 or not rest or seen < self.texts or limit_of_last is None or self.longest > limit_of_last:
            return risk
        # All that are too long for a whole batch may come to lie in the last one.
        return risk - (math.comb(rest, long) / math.comb(self.texts, long) if 0 < long <= rest else 0.0)

    def step_by_which(
        self, limit: int, micro_batch_size: int, ranks: int = 1, *, risk: float = 0.5, order: Order = "random"
    ) -> int | None:
        """Return the first forward of an epoch by which the risk is at least ``risk``; None if that is never.

        Raises SpecError.
        """
        if isinstance(risk, bool) or not isinstance(risk, (int, float)) or not 0 < risk <= 1:
            raise SpecError.at("risk", risk, "is not a probability", "Use a number above 0, up to 1.")
        micro_batch_size, ranks = _whole("micro_batch_size", micro_batch_size), _whole("ranks", ranks)
        last = -(-self.texts // (micro_batch_size * ranks))
        if self.risk(limit, micro_batch_size, ranks, order=order) < risk:
            return None
        low, high = 0, last  # not by low, but by high
        while high - low > 1:
            middle = (low + high) // 2
            enough = self.risk(limit, micro_batch_size, ranks, steps=middle, order=order) >= risk
            low, high = (low, middle) if enough else (middle, high)
        return high

    def seen(self, micro_batch_size: int, ranks: int = 1, *, steps: int | None = None, drop_last: bool = False) -> int:
        """Return how many different texts an epoch, or the first ``steps`` forwards of one, go through.

        Raises SpecError.
        """
        micro_batch_size, ranks = _whole("micro_batch_size", micro_batch_size), _whole("ranks", ranks)
        steps = None if steps is None else _whole("steps", steps, 0)
        round_ = micro_batch_size * ranks
        whole = self.texts // round_ * round_ if drop_last else self.texts
        return whole if steps is None else min(whole, steps * round_)


@dataclass(frozen=True)
class Batches:
    """A dataset's lengths as a run's collator and sampler make batches of them."""

    source: str
    """What messages call the lengths."""
    given: Lengths
    padded: Lengths
    order: Order | None
    """None is one that is not modelled."""
    drop_last: bool = False
    max_steps: int | None = None
    """Of the optimizer, if the run ends by them."""
    limit: int | None = None
    """Tokens of the longest that fits for certain, 0 if none does; None if it is not known how much there is."""
    limit_of_last: int | None = None
    """Likewise for the smaller batch at the end, on one rank; None is ``limit``."""


def collated(
    lengths: Lengths, arguments: Mapping[str, Any], max_length: int | None, source: str = "lengths"
) -> Batches:
    """Return a dataset's batches as a script's arguments ask for them; ``max_length`` is where texts are cut.

    Arguments are those of TrainingArguments (``train_sampling_strategy``, of older versions ``group_by_length``,
    ``dataloader_drop_last``, ``max_steps``), and ``pad_to_max_length`` and ``pad_to_multiple_of`` of scripts. Raises
    SpecError.
    """
    padding: Padding = "max_length" if arguments.get("pad_to_max_length") and max_length is not None else "longest"
    multiple = arguments.get("pad_to_multiple_of")
    named = arguments.get("train_sampling_strategy") or (
        "group_by_length" if arguments.get("group_by_length") else "random"
    )
    order: Order | None = next((each for each in get_args(Order) if each == named), None)
    most = arguments.get("max_steps")
    return Batches(
        source,
        lengths,
        lengths.padded(max_length, padding, multiple),
        order,
        bool(arguments.get("dataloader_drop_last")),
        most if isinstance(most, int) and most > 0 else None,
    )


def _all_within(good: int, of: int, drawn: int) -> float:
    """The probability that all of ``drawn`` texts are among ``good`` ones of all: C(good, drawn) / C(of, drawn)."""
    if drawn > good:
        return 0.0
    if good == of:
        return 1.0
    # The same, drawn the other way around: none of the bad ones is among the drawn.
    fewer, more = sorted((of - good, drawn))
    if fewer <= 10_000:
        return math.exp(math.fsum(math.log1p(-more / (of - number)) for number in range(fewer)))
    # Logarithms of gamma functions lose 1e-16 of numbers up to n log n each: some 1e-7 for a hundred million texts.
    return math.exp(
        math.lgamma(good + 1) - math.lgamma(good - drawn + 1) - math.lgamma(of + 1) + math.lgamma(of - drawn + 1)
    )


def _items(lengths: Any) -> Iterator[Any]:
    """What lengths are made of: the numbers of an array, which are no ints, as such."""
    if not isinstance(lengths, (str, bytes)):
        with suppress(TypeError):  # of what only looks like a list, and of an array without dimensions
            _refuse_many(len(lengths) if hasattr(lengths, "__len__") else 0)
            return iter(lengths.tolist() if hasattr(lengths, "tolist") else lengths)
    raise SpecError.at("lengths", lengths, "are no lengths", "Give numbers of tokens, or the path of a file.")


def _length(value: Any) -> int:
    """A number of tokens; of a text that is tokenized, how many it has."""
    number = value
    if hasattr(value, "__len__") and not isinstance(value, (str, bytes, Mapping)):
        with suppress(TypeError):  # of an array without dimensions, which is a number
            number = len(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    try:
        tokens = -1 if isinstance(number, bool) else index(number)
    except (TypeError, ValueError, RuntimeError):
        tokens = -1
    if not 0 <= tokens <= LONGEST_TEXT:
        problem, remedy = "is not a number of tokens", f"Use integers from 0 to {LONGEST_TEXT}."
        raise SpecError.at("lengths", value, problem, remedy)
    return tokens


def _whole(name: str, value: Any, least: int | None = 1) -> int:
    """An argument that counts something. Raises SpecError."""
    try:
        number = None if isinstance(value, bool) else index(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or (least is not None and number < least):
        problem = "is not a whole number" if least is None else f"is not a whole number from {least} on"
        raise SpecError.at(name, value, problem, "Give one.")
    return number


def _refuse_many(texts: int) -> None:
    if texts > MOST_TEXTS:
        raise SpecError(f"lengths: are of more than {MOST_TEXTS} texts, too many. Give those of a sample of them.")


def _column(data: Mapping[str, Any]) -> Any:
    """The lengths among the columns of a table."""
    for name in _NAMES:
        if name in data:
            return data[name]
    if len(data) == 1:
        return next(iter(data.values()))
    names = ", ".join(short(str(name)) for name in list(data)[:5]) or "nothing"
    raise SpecError(f"lengths: {names} are the columns, none of which is known. Call it length.")


# -- files -------------------------------------------------------------------------------------------------------------


def read_lengths(source: Any) -> Lengths:
    """Read lengths from a file, or count those that are given.

    A file is ``.txt`` (a number on each line), ``.csv`` (a column ``length``, or the only one), ``.json`` (a list, or
    an object with one), ``.npy`` (an array of integers; nothing is unpickled) or ``.parquet`` (where pyarrow is there).

    Raises SpecError for what cannot be read, naming the file.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source if isinstance(source, Lengths) else Lengths.of(source)
    path = Path(source)
    _refuse_what_is_no_file(path)
    try:
        return Lengths.of(_READERS.get(path.suffix.lower(), _text)(path))
    except SpecError as error:
        raise SpecError(f"{path}: {str(error).removeprefix('lengths: ')}") from None
    except RecursionError:
        raise SpecError(f"{path}: is nested too deeply. Give a list of numbers.") from None
    except (OSError, ValueError, csv.Error) as error:
        reason = str(error).split("\n")[0][:200]
        raise SpecError(f"{path}: cannot be read ({reason}). Give a list of numbers.") from None


def _refuse_what_is_no_file(path: Path) -> None:
    try:
        status = path.stat() if path.is_file() else None
    except (OSError, ValueError):
        status = None
    if status is None:
        raise SpecError.at("lengths", str(path), "is not a file that can be read", "Give a file, or the numbers.")
    if status.st_size > LARGEST_FILE:
        raise SpecError(f"{path}: has {status.st_size} bytes, too many. Save the lengths alone, as .npy.")


def _text(path: Path) -> Iterator[int]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if text:
                yield _number(text, f"line {number}")


def _number(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise SpecError.at(where, text, "is not a number of tokens", "Write one on each line.")
    return int(text)


def _csv(path: Path) -> Iterator[int]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        head = next(rows, [])
        if len(head) == 1 and head[0].strip().isdigit():
            yield int(head[0])
            place = 0
        else:
            columns: dict[str, int] = {name.strip(): number for number, name in enumerate(head)}
            place = _column(columns)
        for number, row in enumerate(rows, 2):
            if row:
                yield _number(row[place].strip() if place < len(row) else "", f"line {number}")


def _json(path: Path) -> Any:
    import json

    if path.stat().st_size > LARGEST_JSON:
        raise SpecError(f"lengths: are more than {LARGEST_JSON} bytes of JSON. Save them as .npy.")
    data = json.loads(path.read_bytes())
    return _column(data) if isinstance(data, dict) else data


def _npy(path: Path) -> Any:
    """The header is read first: what it asks for need not be there."""
    from tokenize import TokenError

    import numpy as np

    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise SpecError(
                f"lengths: are in version {version[0]} of .npy, which is for tables. Save an array of integers."
            )
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            shape, _, dtype = read_header(file)
        except (TypeError, SyntaxError, TokenError, OverflowError, MemoryError) as error:
            raise SpecError(f"lengths: have a header that is none ({type(error).__name__}). Save them again.") from None
        if dtype.kind not in "iuf":
            raise SpecError(f"lengths: are of type {str(dtype)[:60]}, which are no numbers. Save an array of integers.")
        if len(shape) != 1:
            raise SpecError(f"lengths: have {len(shape)} dimensions. Give one number for each text.")
        _refuse_many(shape[0])
        if not 0 <= shape[0] * dtype.itemsize <= path.stat().st_size - file.tell():
            raise SpecError(f"lengths: are {shape[0]} by the file's header, and fewer in it. Save them again.")
        return np.fromfile(file, dtype, shape[0])


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise SpecError("lengths: are in a .parquet, for which pyarrow is missing. Save them as .npy.") from None
    try:
        file = parquet.ParquetFile(path)
        _refuse_many(file.metadata.num_rows)  # a few bytes may hold as many as they like
        name = _column({each: each for each in file.schema_arrow.names})
        return file.read(columns=[name]).column(name).to_pylist()
    except SpecError:
        raise
    except (OSError, ValueError, LookupError) as error:  # pyarrow's own errors are among these
        raise SpecError(f"lengths: cannot be read ({str(error)[:200]}). Save them as .npy.") from None


_READERS: dict[str, Any] = {".csv": _csv, ".json": _json, ".npy": _npy, ".parquet": _parquet}
