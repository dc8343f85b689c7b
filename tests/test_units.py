import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.errors import SpecError
from memplan.units import GB, MB, GiB, KiB, MiB, format_gib, parse_bytes, parse_gib


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GiB),
        (" 1.5 gib ", 3 * GiB // 2),
        ("80GB", 80 * GB),
        ("16 MB", 16 * MB),
        ("512 MiB", 512 * MiB),
        ("4KiB", 4 * KiB),
        ("7 B", 7),
        ("1e3 MiB", 1000 * MiB),
        (".5 TiB", 512 * GiB),
        (12345, 12345),
        (0, 0),
    ],
)
def test_parse_bytes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["24", 24, 24.0, "24GiB", "24576 MiB"])
def test_a_bare_number_is_gib_for_parse_gib(text: str | float) -> None:
    assert parse_gib(text) == 24 * GiB


def test_text_without_a_unit_is_not_guessed() -> None:
    with pytest.raises(SpecError) as error:
        parse_bytes("24", "gpu_memory")
    assert str(error.value) == "gpu_memory: '24' has no unit. Write 24GiB if it is in GiB."


@pytest.mark.parametrize("parse", [parse_bytes, parse_gib])
@pytest.mark.parametrize(
    "bad",
    [
        "",
        "GiB",
        "-1GiB",
        "nan",
        "1e30 GiB",
        "12 parsecs",
        -1,
        float("nan"),
        float("inf"),
        1e30,
        True,
        None,
        [1],
        10**400,
    ],
)
def test_what_is_not_a_size_is_refused_by_name(parse, bad) -> None:
    with pytest.raises(SpecError, match=r"^nvme: .+\. .+\.$"):
        parse(bad, "nvme")


@given(st.integers(0, 2**50))
def test_whole_bytes_survive(size: int) -> None:
    assert parse_bytes(size) == size
    assert parse_bytes(f"{size} B") == size


def test_format_gib() -> None:
    assert format_gib(13 * GiB + GiB // 2) == "13.50 GiB"
    assert format_gib(2000 * GiB) == "2,000.00 GiB"
